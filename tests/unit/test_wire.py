"""What goes into a message comes out of it, and nothing else is believed."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedraclora import tree
from fedraclora.clients.client_state import restore
from fedraclora.clients.worker import answer_of
from fedraclora.engines.asks import AskWriter, read_ask
from fedraclora.engines.records import array_record, read_answer, write_answer
from fedraclora.errors import WireError
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, Factor, RoundInstructions
from fedraclora.protocol.program import LocalResult
from fedraclora.protocol.rank_budgets import uploaded_mask, widen
from fedraclora.run.client_state import ClientStore
from fedraclora.sketch import SketchSpec
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.results import join_results
from fedraclora.tree import Layout, Tree
from fedraclora.wire.answers import StageAnswer, TrainedAnswer, answer_kind
from fedraclora.wire.exchange import Ask, OwnPart, Stage, TrainRequest, payload_bytes, shared_of
from fedraclora.wire.reply import ExpectedReply, checked
from tests.common import normal
from tests.example_program import Example
from tests.messages import pack_downlink, unpack_downlink

K, M, R, N = 4, 5, 2, 7
SPEC = SketchSpec("coordinate", "right", R, N, seed=2**62 + 3, index=5, blocks="cover")
CLIENTS = torch.tensor([2, 3, 5, 2**33])
ORDER = TrainRequest(9, 8, 1.0 / 3.0, CLIENTS)


def everything() -> RoundInstructions:
    """A downlink with each kind of factor, shared and per client."""
    own: dict[str, Factor] = {
        "B": to_train((M, R), normal(K, M, R)),
        "R": normal(K, R, R),
        "A": normal(R, N),
    }
    return RoundInstructions(
        adapters={
            "w": Adapter.of({"B": to_train((M, R)), "A": SPEC}, 5.0 / 3.0),
            "v": Adapter.of(own, 1e-300),
        },
        dense={
            "head.weight": to_train((3, M), main=False),
            "head.bias": to_train((3,), normal(3), main=False),
            "private": to_train((2,), normal(K, 2), upload=False),
        },
        program=Example(2, {"w": 3}),
    )


def same_factor(left: Factor, right: Factor) -> bool:
    said = replace(left, numbers=None) == replace(right, numbers=None)
    if left.numbers is None or right.numbers is None:
        return said and left.numbers is right.numbers
    return said and torch.equal(left.numbers, right.numbers)


def assert_same(left: RoundInstructions, right: RoundInstructions) -> None:
    assert left.program == right.program
    assert list(left.adapters) == list(right.adapters)
    for name, adapter in left.adapters.items():
        other = right.adapters[name]
        assert adapter.scale == other.scale
        assert list(adapter.factors) == list(other.factors)
        assert all(same_factor(f, other.factors[k]) for k, f in adapter.factors.items())
    assert list(left.dense) == list(right.dense)
    assert all(same_factor(s, right.dense[n]) for n, s in left.dense.items())


# --- downlink ------------------------------------------------------------------------------------


def test_an_extra_travels_beside_what_is_trained() -> None:
    sent = replace(everything(), extras={"own": {"w/B": normal(M, R)}, "more": {}})
    content = pack_downlink(sent, ORDER, "float64")
    got, _ = unpack_downlink(content)
    assert_same(got, sent)
    assert got.extras.keys() == {"own", "more"}
    assert torch.equal(got.extras["own"]["w/B"], normal(M, R))
    with pytest.raises(WireError, match=r"extras \['more', 'own'\]"):
        restore(ClientStore(), got, ORDER, {"w": normal(M, N)}, LocalConfig(lr=0.5))


@pytest.mark.parametrize("tree", [{"nothing": normal(M, R)}, {"w/B": normal(R, M)}])
def test_an_extra_beside_nothing_that_is_trained_is_refused(tree: Tree) -> None:
    content = pack_downlink(replace(everything(), extras={"own": tree}), ORDER, "float64")
    with pytest.raises(WireError, match=f"extra own .*names {next(iter(tree))}"):
        unpack_downlink(content)


def test_a_downlink_comes_back_to_the_bit() -> None:
    sent = everything()
    got, request = unpack_downlink(pack_downlink(sent, ORDER, "float64"))
    assert_same(got, sent)
    assert list(got.trained()) == list(sent.trained())
    assert (request.round_, request.version, request.rate_scale) == (9, 8, 1.0 / 3.0)
    assert torch.equal(request.clients, CLIENTS)


@given(st.integers(0, K - 1), st.integers(1, K))
def test_a_chunk_gets_its_own_rows_only(first: int, size: int) -> None:
    sent, places = everything(), slice(first, first + size)
    request = replace(ORDER, clients=CLIENTS[places], first=first)
    got, _ = unpack_downlink(pack_downlink(sent, request, "float64"))
    start, own = got.adapters["v"].factors["B"], sent.adapters["v"].factors["B"]
    assert start.trained
    assert own.trained
    assert torch.equal(start.draw(), own.draw()[places])
    core, shared = got.adapters["v"].factors["R"], got.adapters["v"].factors["A"]
    assert torch.equal(core.draw(), normal(K, R, R)[places])
    assert torch.equal(shared.draw(), normal(R, N))


def test_numbers_travel_in_the_precision_that_is_asked_for() -> None:
    content = pack_downlink(everything(), ORDER, "float32")
    got, request = unpack_downlink(content)
    bias = got.dense["head.bias"].draw()
    assert bias.dtype == torch.float32
    assert torch.equal(bias, normal(3).float())
    assert request.rate_scale == 1.0 / 3.0
    assert got.adapters["v"].scale == 1e-300


def test_a_downlink_without_numbers_comes_back() -> None:
    sent = RoundInstructions({"w": Adapter.of({"B": to_train((M, R)), "A": SPEC}, 1.0)})
    content = pack_downlink(sent, ORDER, "float32")
    got, _ = unpack_downlink(content)
    assert_same(got, sent)
    array = content["arrays"]
    assert isinstance(array, ArrayRecord)
    assert array["flat"].numpy().size == 0
    assert payload_bytes(sent, K, "float32") == 8


def test_a_start_that_is_drawn_travels_as_a_seed() -> None:
    pair: dict[str, Factor] = {"B": to_train((M, R)), "A": to_train((R, N), SPEC)}
    sent = RoundInstructions({"w": Adapter.of(pair, 1.0)})
    got, _ = unpack_downlink(pack_downlink(sent, ORDER, "float32"))
    assert_same(got, sent)
    start = got.adapters["w"].factors["A"]
    assert start.trained
    assert not start.per_client
    opening = start.opening()
    assert opening is not None
    assert torch.equal(opening, SPEC.draw())
    assert payload_bytes(sent, K, "float32") == 8


def test_the_payload_counts_numbers_of_one_client_and_seeds() -> None:
    numbers = M * R + R * R + R * N + 3 + 2
    assert payload_bytes(everything(), K, "float32") == numbers * 4 + 8
    assert payload_bytes(everything(), K, "float64") == numbers * 8 + 8
    assert payload_bytes(RoundInstructions(), K, "float64") == 0


def arrays_of(content: RecordDict) -> list[Any]:
    """Every array of a message."""
    return [r["flat"].numpy() for r in content.values() if isinstance(r, ArrayRecord)]


@pytest.mark.parametrize("place", range(K))
def test_the_payload_is_the_arrays_of_a_message_to_one_client(place: int) -> None:
    request = replace(ORDER, clients=CLIENTS[place : place + 1], first=place)
    content = pack_downlink(everything(), request, "float64")
    numbers = sum(array.nbytes for array in arrays_of(content))
    assert numbers + 8 == payload_bytes(everything(), K, "float64")


def test_what_a_cohort_shares_is_written_once() -> None:
    writer, sent = AskWriter(), everything()
    parts = [replace(ORDER, clients=CLIENTS[i : i + 2], first=i) for i in (0, 2)]
    first, second = (writer.write(Ask(part, sent, apart=True)) for part in parts)
    assert first["arrays"] is second["arrays"]
    assert first["config"] is second["config"]
    assert [read_ask(each).request.first for each in (first, second)] == [0, 2]
    plain = RoundInstructions()
    again = [read_ask(writer.write(Ask(part, plain))).downlink for part in parts]
    assert again == [RoundInstructions(), RoundInstructions()]


def test_a_message_is_one_array_and_one_for_what_clients_do_not_share() -> None:
    content = pack_downlink(everything(), ORDER, "float64")
    assert sorted(content) == ["arrays", "chunk", "config", "own"]
    assert all(len(record) == 1 for record in content.values() if isinstance(record, ArrayRecord))
    assert "own" not in pack_downlink(RoundInstructions(), ORDER, "float64")


def edited(content: RecordDict, edit: dict[str, object]) -> RecordDict:
    """The same message with another header."""
    config = content["config"]
    assert isinstance(config, ConfigRecord)
    config["header"] = json.dumps(json.loads(str(config["header"])) | edit)
    return content


def test_a_message_without_its_records_is_refused() -> None:
    wrong = RecordDict({"config": array_record(torch.zeros(1)), "arrays": ConfigRecord()})
    with pytest.raises(WireError, match="expected the ConfigRecord config"):
        unpack_downlink(wrong)


@pytest.mark.parametrize("gone", ["config", "arrays", "chunk", "own"])
def test_a_message_that_lacks_a_record_is_refused(gone: str) -> None:
    content = pack_downlink(everything(), ORDER, "float64")
    del content[gone]
    with pytest.raises(WireError, match=rf"expected the .*{gone}"):
        unpack_downlink(content)


def test_a_frozen_factor_without_its_numbers_is_refused() -> None:
    adapters = {"w": {"scale": 1.0, "factors": {"A": {"numbers": []}}}}
    content = pack_downlink(RoundInstructions(), ORDER, "float64")
    with pytest.raises(WireError, match=r"no numbers of .*w/factors/A"):
        unpack_downlink(edited(content, {"downlink": {"adapters": adapters}}))


def test_a_dense_tensor_has_to_be_trained() -> None:
    content = pack_downlink(RoundInstructions(), ORDER, "float64")
    with pytest.raises(WireError, match="b is frozen"):
        unpack_downlink(edited(content, {"downlink": {"dense": {"b": {"sketch": vars(SPEC)}}}}))


@pytest.mark.parametrize(
    ("described", "why"),
    [
        ({}, "one of these"),
        ({"sketch": vars(SPEC), "numbers": [], "shape": [R, N]}, "one of these"),
        ({"coefficients": []}, "no numbers of"),
        ({"sketch": vars(SPEC), "shape": [R, N + 1]}, "came in the shape"),
        ({"sketch": vars(SPEC), "shape": [N, R], "trained": True}, "came in the shape"),
        ({"sketch": vars(SPEC), "count": 0}, "the number of parts"),
    ],
)
def test_a_factor_says_one_thing_of_itself(described: dict[str, object], why: str) -> None:
    sent = RoundInstructions({"w": Adapter.of({"B": to_train((M, R)), "A": normal(R, N)}, 1.0)})
    content = pack_downlink(sent, ORDER, "float64")
    plain = {"adapters": {"w": {"factors": {"A": described}, "scale": 1.0}}}
    with pytest.raises(WireError, match=why):
        unpack_downlink(edited(content, {"downlink": plain}))


# --- uplink --------------------------------------------------------------------------------------


def reply_of(*given: Any) -> RecordDict:
    """A reply as it leaves the process."""
    return write_answer(answer_of(*given))


def unpack_result(content: RecordDict, *given: Any) -> TrainedAnswer:
    """A reply as the server has it."""
    return checked(
        read_answer(content, Ask(ORDER)), Ask(ORDER), TrainedAnswer, ExpectedReply(9, 8, *given)
    )


LAYOUT = Layout((("w/B", (M, R)), ("b", (3,))))


def result(count: int, dtype: torch.dtype = torch.float64) -> LocalResult:
    trained: Tree = {n: normal(count, *s).to(dtype) for n, s in LAYOUT.shapes}
    trained["private"] = normal(count, 4)  # stays at the client
    return LocalResult(trained, normal(count).abs(), torch.arange(count), torch.arange(count) + 1)


def test_what_a_part_of_a_chunk_says_is_kept() -> None:
    told = replace(result(2), metrics={"reward": torch.tensor([1.0, 2.0]).double()})
    joined = join_results([result(1), told])
    assert joined is not None
    assert [f"{number:g}" for number in joined.metrics["reward"]] == ["nan", "1", "2"]


@given(st.integers(1, K), st.sampled_from([torch.float32, torch.float64]))
def test_a_reply_comes_back_to_the_bit(count: int, dtype: torch.dtype) -> None:
    sent, clients = result(count, dtype), CLIENTS[:count]
    failures = {7: "it broke", 2**33 + 1: "so did it"}
    content = reply_of(sent, ORDER, clients, LAYOUT, failures, ["a note"])
    reply = unpack_result(content, LAYOUT)
    assert (reply.round_, reply.version) == (9, 8)
    assert torch.equal(reply.clients, clients)
    assert torch.equal(reply.losses, sent.losses)
    assert torch.equal(reply.samples, sent.samples)
    assert torch.equal(reply.steps, sent.steps)
    assert reply.failures == failures
    assert reply.notes == ["a note"]
    assert reply.numbers.dtype == dtype
    rows = LAYOUT.unpack(reply.numbers)
    assert all(torch.equal(rows[n], sent.trained[n]) for n, _ in LAYOUT.shapes)


def test_large_tensors_are_joined_where_a_reply_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "LARGE", 3)
    sent = result(2)
    answer = answer_of(sent, ORDER, CLIENTS[:2], LAYOUT, {}, [])
    kept = checked(answer, Ask(ORDER), TrainedAnswer, ExpectedReply(9, 8, LAYOUT))
    assert [piece.data_ptr() for piece in kept.pieces] == [
        sent.trained[name].data_ptr() for name, _ in LAYOUT.shapes
    ]
    assert kept.shape == (2, LAYOUT.size)
    read = unpack_result(write_answer(answer), LAYOUT)
    assert torch.equal(read.pieces[0], kept.numbers)
    answer = answer_of(sent, ORDER, CLIENTS[:1], LAYOUT, {}, [])
    with pytest.raises(WireError, match=r"rows of shape \(2, "):
        checked(answer, Ask(ORDER), TrainedAnswer, ExpectedReply(9, 8, LAYOUT))


def test_what_is_not_uploaded_does_not_travel() -> None:
    downlink = everything()
    assert "private" not in dict(downlink.layout.shapes)
    assert list(dict(downlink.layout.shapes)) == list(downlink.uploaded())
    content = reply_of(result(2), ORDER, CLIENTS[:2], LAYOUT, {}, [])
    assert unpack_result(content, LAYOUT).numbers.shape == (2, LAYOUT.size)


BUDGETS = RoundInstructions(
    {"w": Adapter.of({"B": to_train((M, R)), "A": SPEC}, 1.0)},
    {"b": to_train((3,))},
    ranks=torch.tensor([1, 2, 9, 1]),
)


def test_a_client_is_told_its_own_budget() -> None:
    request = replace(ORDER, clients=CLIENTS[1:3], first=1)
    got, _ = unpack_downlink(pack_downlink(BUDGETS, request, "float64"))
    assert got.ranks is not None
    assert got.ranks.tolist() == [2, 9]
    assert unpack_downlink(pack_downlink(everything(), ORDER, "float64"))[0].ranks is None


def test_what_is_beyond_a_budget_does_not_travel() -> None:
    places = torch.tensor([0, 1, 3])
    sent = result(3)
    mask = uploaded_mask(BUDGETS, places)
    content = reply_of(sent, ORDER, CLIENTS[places], LAYOUT, {}, [], mask)
    numbers = unpack_result(content, LAYOUT, BUDGETS.ranks).numbers
    assert numbers.shape == (M + 3 + 2 * M + 3 + M + 3,)
    rows = LAYOUT.unpack(widen(numbers, BUDGETS, places))
    assert torch.equal(rows["b"], sent.trained["b"])
    for k, rank in enumerate((1, 2, 1)):
        assert torch.equal(rows["w/B"][k, :, :rank], sent.trained["w/B"][k, :, :rank])
        assert torch.count_nonzero(rows["w/B"][k, :, rank:]) == 0


def test_whole_rows_where_cut_ones_are_wanted_are_refused() -> None:
    content = reply_of(result(2), ORDER, CLIENTS[:2], LAYOUT, {}, [])
    with pytest.raises(WireError, match=r"round 9: .*shape \(2, 13\)"):
        unpack_result(content, LAYOUT, BUDGETS.ranks)


def test_a_chunk_in_which_all_failed_still_says_who() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    reply = unpack_result(reply_of(None, ORDER, none, LAYOUT, {5: "x"}, []), LAYOUT)
    assert reply.failures == {5: "x"}
    assert reply.numbers.shape == (0, LAYOUT.size)
    for vector in (reply.clients, reply.losses, reply.samples, reply.steps):
        assert len(vector) == 0
    assert reply.losses.dtype == torch.float64


def test_a_reply_of_another_layout_names_round_clients_and_shapes() -> None:
    other = Layout((("w/B", (M, R + 1)), ("b", (3,))))
    content = reply_of(result(2), ORDER, CLIENTS[:2], LAYOUT, {}, [])
    with pytest.raises(WireError) as caught:
        unpack_result(content, other)
    text = str(caught.value)
    assert "round 9: clients [2, 3]" in text
    assert "(5, 2)" in text
    assert "(5, 3)" in text


def test_a_reply_with_missing_rows_is_refused() -> None:
    content = reply_of(result(2), ORDER, CLIENTS[:3], LAYOUT, {}, [])
    with pytest.raises(WireError, match=r"round 9: .* rows of shape \(2, 13\).* \(3, 13\)"):
        unpack_result(content, LAYOUT)


# Checks and sums broadcast: of two clients with one weight, the second would be left out.
@pytest.mark.parametrize("vector", ["losses", "samples", "steps"])
def test_a_reply_with_missing_numbers_is_refused(vector: str) -> None:
    content = reply_of(result(3), ORDER, CLIENTS[:3], LAYOUT, {}, [])
    config = content["chunk"]
    assert isinstance(config, ConfigRecord)
    stored = config[vector]
    assert isinstance(stored, bytes)
    config[vector] = stored[:-8]
    with pytest.raises(WireError, match="round 9"):
        unpack_result(content, LAYOUT)


# BUG (fails): a vector that is missing altogether is a KeyError that names neither round nor wish.
@pytest.mark.parametrize("vector", ["losses", "samples", "steps"])
def test_a_reply_that_lacks_a_vector_is_refused(vector: str) -> None:
    content = reply_of(result(3), ORDER, CLIENTS[:3], LAYOUT, {}, [])
    config = content["chunk"]
    assert isinstance(config, ConfigRecord)
    del config[vector]
    with pytest.raises(WireError, match="round 9"):
        unpack_result(content, LAYOUT)


# --- between processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [None, torch.tensor([1, 2, 2, 1])])
def test_what_is_shared_and_what_is_a_clients_own_come_together_again(
    ranks: torch.Tensor | None,
) -> None:
    ask = Ask(replace(ORDER, clients=CLIENTS[1:3], first=1), everything(), apart=True)
    ask = replace(ask, downlink=replace(everything(), ranks=ranks))
    shared, part = pickle.loads(pickle.dumps((shared_of(ask), OwnPart.of(ask))))
    assert not any(each.per_client for each in shared.own.named.values())
    found = part.joined(shared)
    assert_same(found.own, ask.own)
    assert found.clients == [3, 5]
    assert (found.own.ranks is None) == (ranks is None)
    assert ranks is None or torch.equal(found.own.ranks, ranks[1:3])


@pytest.mark.parametrize("reduce", [None, "uniform"])
def test_an_answer_goes_to_another_process_as_it_is(
    reduce: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "LARGE", 3)
    request = replace(ORDER, reduce=reduce)
    answer = answer_of(result(K), request, CLIENTS, LAYOUT, {7: "it broke"}, ["a note"])
    found = pickle.loads(pickle.dumps(answer))
    assert type(found) is type(answer) is answer_kind(Ask(request))
    assert (found.failures, found.notes, found.layout) == ({7: "it broke"}, ["a note"], LAYOUT)
    assert torch.equal(found.numbers, answer.numbers)
    assert all(torch.equal(found.vectors[n], each) for n, each in answer.vectors.items())


@pytest.mark.parametrize("stage", ["keys", "masked"])
def test_a_stage_comes_back_with_its_words_and_no_others(stage: str) -> None:
    ask = Ask(ORDER, stage=Stage(stage, {}, {}))
    words = torch.arange(8).to(torch.uint32).reshape(2, 4) if stage == "masked" else None
    sent = StageAnswer(
        round_=9,
        version=8,
        clients=CLIENTS[:2],
        stage=Stage(stage, {}, {2: {"a": [1]}}),
        words=words,
    )
    records = write_answer(sent)
    assert ("arrays" in records) == (words is not None)
    found = checked(read_answer(records, ask), ask, StageAnswer, ExpectedReply(9, 8))
    assert found.stage == sent.stage
    assert (found.words is None) == (words is None)
    assert words is None or torch.equal(found.words, words)
    with pytest.raises(WireError, match=r"'staged'.*'trained'"):
        read_answer(records, Ask(ORDER))
