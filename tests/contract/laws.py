"""``python -m tests.contract.laws``: writes the laws of all methods into CONTRIBUTING.md.

A law is held by one test or more of the contract suite. Where an assertion of one of them fails,
its report says which law that is, what is the likely cause, and what to do (`conftest.py`). A test
that stops by another error did not get as far as its law, and the error says what is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
BEGIN, END = "<!-- laws: begin -->\n", "<!-- laws: end -->\n"


@dataclass(frozen=True)
class Law:
    """A law of all methods.

    Attributes:
        says: The law, in one sentence.
        cause: What has usually gone wrong where it is broken.
        mend: The attribute to set, or what to call.
        tests: Names of the tests that hold it, without ``test_``.
    """

    says: str
    cause: str
    mend: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"The law: {self.says}\nLikely cause: {self.cause}.\nWhat to do: {self.mend}."


LAWS = (
    Law(
        "With `exact`, the new weights are the weighted mean of the clients' (after the server's "
        "step); without it a round misses that mean by 1 % of its change or more.",
        "a scale, a transpose or a weight is missing or counted twice, a factor is merged and "
        "carried on, or means of factors stand where the mean of their products is meant",
        "`replies.product()`; `carried` or `merged`, by `layer.ends`; `traits.exact`; "
        "`traits.step` where the server steps further",
        (
            "exact_methods_give_the_mean_of_the_clients_weights",
            "what_is_sent_is_averaged_exactly",
        ),
    ),
    Law(
        "A method that is not exact reports by how much each round missed that mean.",
        "what the round carries or merges is not what stands for the mean of the clients",
        "`LayerUpdate(aggregate=...)`",
        ("inexact_methods_report_the_error_of_the_round",),
    ),
    Law(
        "A cohort of one, or of clients that answer alike, gives the weights of one of them.",
        "a weight is left in a sum, a factor is told by its shape, a factor is merged and carried "
        "on, or client and server scale differently",
        "`replies.mean(label)`; `carried` or `merged`, by `layer.ends`; no scale of your own; "
        "`traits.step` where the server steps further",
        (
            "a_cohort_of_one_gives_the_weights_of_that_client",
            "a_rank_may_equal_a_side",
            "equal_replies_give_the_weights_of_one_of_them",
            "equal_clients_are_one_client",
            "the_server_ends_with_the_weights_that_a_client_trained_to",
        ),
    ),
    Law(
        "The scale is `alpha / rank`, and with `rslora` over its root.",
        "alpha stands alone, or a rank is another than that of the layer",
        "read `layer.scale`; `scale_of(rank)` is what gives it",
        ("the_scale_is_alpha_over_the_rank", "rslora_is_alpha_over_the_root_of_the_rank"),
    ),
    Law(
        "A common factor of the aggregation weights changes nothing.",
        "a sum is not divided by the sum of the weights",
        "`replies.mean(label)`, `replies.product()`",
        ("the_scale_of_the_aggregation_weights_is_irrelevant",),
    ),
    Law(
        "A client of weight 2w counts as two of weight w that answer alike.",
        "clients are counted, and not their weights",
        "`replies.mean(label)`, `replies.product()`",
        (
            "every_client_counts_by_its_weight",
            "uniform_weights_differ_from_examples_where_clients_do",
        ),
    ),
    Law(
        "With `linear`, a round needs no more of the replies than their weighted sum.",
        "`update` looks at the replies of single clients, or averages them by itself",
        "`replies.mean(label)` for a mean; `traits.linear` to False if it needs single replies",
        (
            "linear_methods_need_only_the_weighted_sum",
            "a_linear_method_is_the_same_under_the_aggregator_sum",
        ),
    ),
    Law(
        "A run starts from the base weights, and each round from those that the server holds.",
        "no factor of a new adapter is zero, or the base still has what the factors begin with",
        "`layer.trained(label)` for one factor; a start that is taken out of the base",
        (
            "a_run_starts_from_the_base_weights",
            "no_local_steps_leave_the_effective_weights",
            "a_round_starts_from_the_weights_that_the_server_holds",
        ),
    ),
    Law(
        "What is carried and trained is what is sent next.",
        "a factor begins at zero, or is drawn, though the last round carried it",
        "`layer.trained(label)` in place of `to_train(shape)`; or carry it no longer",
        ("what_is_carried_and_trained_is_what_is_sent_next",),
    ),
    Law(
        "Within a link the same factors are trained and go on from their mean (after the server's "
        "step), and frozen ones stay; it has as many rounds as the method says.",
        "the factors of a round are chosen by its number, and not by that of the link; or a factor "
        "goes on from something else than the clients' mean: then say `carries`",
        "`link_rounds`; `traits.varies` where clients train other factors by turns",
        (
            "the_number_of_the_link_says_whether_what_is_trained_lives_on",
            "a_sketch_lives_for_as_many_rounds_as_it_says",
        ),
    ),
    Law(
        "The merge at the end of a link leaves the weights as they are.",
        "a factor is merged and carried on, or merged under another frozen one",
        "either `carried` or `merged` of a `LayerUpdate`, by `layer.ends`",
        ("a_merge_leaves_the_effective_weights_as_they_are",),
    ),
    Law(
        "The base of an adapted weight changes if and only if the method merges.",
        "the trait says something else than the method does",
        "`traits.merges`",
        ("the_base_of_a_target_changes_iff_the_method_merges",),
    ),
    Law(
        "A round closes under the factors that it sent.",
        "a factor is drawn anew where the round closes",
        "`replies[label]`",
        ("replies_close_under_the_downlink_that_asked_for_them",),
    ),
    Law(
        "The links, on disk too, rebuild the base and the weights of each round to the bit.",
        "the base changes by something that is not `merged`",
        "`LayerUpdate(merged=...)`",
        (
            "the_links_rebuild_the_base_to_the_bit",
            "the_chain_on_disk_rebuilds_the_base_and_weights_of_every_round_to_the_bit",
            "a_compacted_chain_rebuilds_what_it_keeps_to_the_bit",
        ),
    ),
    Law(
        "What is merged or averaged is rounded once, from float64.",
        "a mean or a product is formed in the precision of the weights",
        "`replies.mean(label)`; `.double()` before a product of your own",
        ("merging_rounds_once_from_float64", "averages_are_rounded_once_from_float64"),
    ),
    Law(
        "A method changes nothing in place, and depends on nothing but its arguments.",
        "a tensor of the state is written to, or something is kept in the method",
        "what must last as `carried` or `keep`",
        (
            "nothing_of_the_state_is_changed_in_place",
            "a_method_is_a_pure_function",
            "the_initial_weights_of_a_world_are_never_written_to",
            "the_same_seed_gives_the_same_bits",
        ),
    ),
    Law(
        "A run that was stopped goes on to the same bits.",
        "something lasts from round to round that no checkpoint holds",
        "what must last as `carried` or `keep`",
        ("a_run_that_is_resumed_ends_with_the_same_bits",),
    ),
    Law(
        "Replies may come in any order.",
        "what is known of a client is taken from another place in the replies",
        "`replies.p` beside `replies.stack(label)`",
        ("replies_may_come_in_any_order",),
    ),
    Law(
        "The counted numbers, `floats`, are what travels each way.",
        "a trained factor crosses the end of a link, or a frozen one is carried",
        "`carries` for the trained one, `keeps` for the frozen one; `floats` for a tensor of yours",
        (
            "floats_is_what_travels",
            "what_is_counted_is_the_formula_of_the_docstring",
            "the_uplink_of_the_ledger_is_the_formula_and_the_message",
            "the_downlink_of_the_ledger_is_the_message",
            "bytes_do_not_depend_on_the_chunk",
            "what_a_message_holds_beside_its_numbers_does_not_grow",
            "catch_up_is_the_links_a_client_missed_or_the_dense_weight",
            "an_update_is_what_is_counted_and_leads_to_the_weights",
        ),
    ),
    Law(
        "Quantized numbers that the server sends twice have the same bits, and clients hold the "
        "weights that the server measures: within a link, after it, and after an absence.",
        "a frozen factor is another one in each round of its link, or what lives on is not among "
        "what is carried",
        "`factors` for what is frozen; `carried` of a `LayerUpdate` for what lives on",
        (
            "what_is_sent_twice_has_the_same_bits",
            "a_client_starts_from_the_weights_that_the_server_measures",
            "a_clients_weights_after_a_link_are_the_servers",
        ),
    ),
    Law(
        "A Conv1D trains as the Linear layer whose transpose it is.",
        "the shape of the stored weight is taken for that of the matrix",
        "`layer.m`, `layer.n`",
        ("a_conv1d_trains_as_the_linear_layer_that_it_transposes",),
    ),
    Law(
        "A method with a field `sketch` is FedAvg where an orthonormal sketch has full rank.",
        "the sketch is not the frozen factor, or its scale is not 1 there",
        "`now.sketch(layer, label, kind)`",
        (
            "an_orthonormal_sketch_of_full_rank_is_fedavg",
            "a_preconditioned_sketch_of_full_rank_is_fedavg",
        ),
    ),
    Law(
        "The loss of a small quadratic falls by a quarter in 25 rounds.",
        "what was learnt is lost between rounds: neither carried nor merged",
        "`carried` or `merged` of a `LayerUpdate`",
        ("the_loss_falls_on_a_quadratic",),
    ),
    Law(
        "What a client keeps does not travel, nobody else has it, and its next round begins there.",
        "a kept factor is uploaded, or begins with the server's",
        "`client_state`; `upload=False` of a trained factor",
        (
            "what_stays_does_not_travel",
            "each_client_goes_on_from_its_own_and_from_nobody_elses",
            "a_client_begins_with_what_it_kept",
            "what_stays_does_not_depend_on_who_trains_beside",
            "a_client_that_is_new_has_the_model_of_the_server",
        ),
    ),
    Law(
        "A method is a frozen dataclass whose fields are the keys of its group and stand in its "
        "docstring; its file says uplink, downlink, source and departures, and knows no framework.",
        "a field, a key or a line of a docstring is missing, or the file does an engine's work",
        "the field and the key by one name",
        (
            "the_fields_are_the_keys_of_the_yaml",
            "defaults_are_those_of_the_class_where_the_name_is_the_class",
            "a_method_is_a_frozen_dataclass_that_subclasses_method",
            "the_docstring_says_what_a_reader_asks",
            "every_hyperparameter_is_documented",
            "a_method_file_imports_neither_flower_nor_the_loop",
        ),
    ),
)

BY_TEST = {f"test_{name}": law for law in LAWS for name in law.tests}


BROKEN = AssertionError, pytest.fail.Exception


def add_law(report: pytest.TestReport, call: pytest.CallInfo[None], test: str) -> None:
    """Have the report of a test say the law that it holds, if an assertion of it failed."""
    failed = call.excinfo is not None and call.excinfo.errisinstance(BROKEN)
    if report.failed and failed and test in BY_TEST:
        report.sections.append((f"law of {test}", str(BY_TEST[test])))


def table() -> str:
    """The laws as they stand in CONTRIBUTING.md."""
    rows = [f"| {law.says} | {law.mend} |\n" for law in LAWS]
    return "".join(["| law | what to set or call where it is broken |\n", "|---|---|\n", *rows])


def listed(page: str) -> str:
    """A page with the laws of today between its two marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(listed(PAGE.read_text()))
