"""Defects of numbers in fewer bits, of pools of sketches, and of projected gradients.

Each names the law that it breaks, by the name of the test that must find it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fedraclora.protocol.factor import weight_of
from fedraclora.protocol.method import Link, RoundInstructions, State, Term
from fedraclora.protocol.quantized import encode
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.methods.galore_average import GaLore, Projection
from fedraclora.strategies.methods.pool_rac_lora import PoolRacLora, added
from fedraclora.strategies.methods.subspace_rac_lora import SubspaceRacLora
from fedraclora.strategies.server import quantized
from fedraclora.strategies.server.quantized import DownlinkRounding, stays
from fedraclora.strategies.shared import layerwise, past
from fedraclora.strategies.shared.layer import Layer
from fedraclora.strategies.shared.layerwise import LayerMethod
from fedraclora.strategies.steps import scaffold
from fedraclora.training.extras.variates import is_lifted
from fedraclora.tree import Tree
from fedraclora.weights.chain import LinkSizes
from fedraclora.weights.update import WeightHistory, WeightUpdate
from fedraclora.wire.feedback import LIFE, left_over, to_add
from tests.campaigns.planting import Planting, defect, defects_of

BITS = ("tests/unit/test_quantized.py",)
ROUNDS = ("tests/contract/test_quantized_rounds.py",)
LINKS = ("tests/contract/test_rounded_links.py",)
FEEDBACK = ("tests/contract/test_feedback.py",)
DRIFT = ("tests/contract/test_control_variates.py",)
POOLS = ("tests/methods/test_pool_rac_lora.py",)
DERIVED = ("tests/contract/test_subspace_rac_lora_rounds.py",)
GALORE = ("tests/methods/test_galore_average.py",)


# ---- Numbers in fewer bits ------------------------------------------------------------


@defect(
    "test_rounding_has_no_bias",
    "QSGD without its draw: rounded to the nearest, where nothing makes up for the bias",
    BITS,
)
def rounded_without_a_draw(planting: Planting) -> None:
    def biased(
        numbers: torch.Tensor, sizes: Any, kind: str, _rng: Any = None, **named: Any
    ) -> torch.Tensor:
        return encode(numbers, sizes, kind, **named)

    planting.function(encode, biased)


@defect(
    "everyone_has_the_servers_bits and fed_rac_lora",
    "compressed on its way down alone: the server goes on with other numbers than its replicas",
    ROUNDS,
)
def server_keeps_what_it_did_not_send(planting: Planting) -> None:
    sound = DownlinkRounding.closed

    def closed(self: DownlinkRounding, before: State, after: State, *rest: Any) -> State:
        sent = sound(self, before, after, *rest)
        return replace(sent, base=after.base)

    planting.put(DownlinkRounding, "closed", closed)


@defect(
    "what_was_sent_in_all_is_off_by_one_rounding",
    "error feedback that takes away what it should add",
    FEEDBACK,
)
def residue_of_the_wrong_sign(planting: Planting) -> None:
    planting.function(left_over, lambda stored, sent, left: left_over(stored, sent, -left))


@defect(
    "what_was_sent_in_all_is_off_by_one_rounding",
    "error feedback that keeps only the last rounding, of the change without what was added",
    FEEDBACK,
)
def residue_forgotten(planting: Planting) -> None:
    planting.function(to_add, lambda stored, sent: torch.zeros_like(to_add(stored, sent)))


@defect(
    "a_residue_of_a_factor_ends_with_its_link",
    "resets nothing: what was left beside one sketch is added beside another",
    FEEDBACK,
)
def residue_outlives_its_link(planting: Planting) -> None:
    def kept(stored: Tree, sent: RoundInstructions) -> torch.Tensor:
        return to_add({**stored, LIFE: torch.full_like(stored[LIFE], sent.frame[2] + 1)}, sent)

    planting.function(to_add, kept)


@defect(
    "the_server_merges_what_rounding_left",
    "a link that ends: what was left of the factor is thrown away",
    FEEDBACK,
)
def residue_lost_where_a_link_ends(planting: Planting) -> None:
    planting.put(quantized, "summed", lambda name, term, moments, sent: term)


@defect(
    "test_in_fewer_bits_variates",
    "SCAFFOLD: the server's c moves from what it holds, clients stepped by what came",
    DRIFT,
)
def variates_moved_from_what_was_not_sent(planting: Planting) -> None:
    sound = scaffold.close_corrected

    def close(state: State, sent: RoundInstructions, *rest: Any) -> Tree:
        held = scaffold.open_corrected(sent, state, lifted=is_lifted(sent))
        return sound(state, held, *rest)

    planting.put(scaffold, "close_corrected", close)


@defect(
    "what_is_sent_twice and subspace_rac_lora and int8",
    "a draw for each round: clients of one link train under other frozen factors in each",
    LINKS,
)
def frozen_factor_rounded_anew(planting: Planting) -> None:
    planting.function(stays, lambda factor: False)


@defect(
    "weights_that_the_server_measures and subspace_rac_lora and int8",
    "within a link the server measures the factor that it rounded, and not what it sent",
    LINKS,
)
def frozen_factor_measured_whole(planting: Planting) -> None:
    planting.put(layerwise, "FROZEN", "nowhere/")


# ---- Pools ----------------------------------------------------------------------------


@defect(
    "test_links_under_one_sketch_add_up_by_hand",
    "a part of a pool replaced by the last link under its sketch",
    POOLS,
)
def part_replaced(planting: Planting) -> None:
    planting.function(added, lambda part, more: more)


@defect(
    "test_links_under_one_sketch_add_up_by_hand or a_pool_reaches",
    "clients train beside the base alone, without what the pool has learnt",
    POOLS,
)
def pool_left_out_where_clients_train(planting: Planting) -> None:
    planting.put(PoolRacLora, "pools", lambda self, state, draw: {})


@defect(
    "test_a_refresh_moves_no_bit", "a pool that is folded into the weights and trained on", POOLS
)
def pool_folded_and_kept(planting: Planting) -> None:
    sound = PoolRacLora.merge

    def merge(self: PoolRacLora, state: State, terms: dict[str, Term], dense: Tree) -> Link:
        link = sound(self, state, terms, dense)
        kept = {n: t if t.numel() else state.base[n] for n, t in link.dense.items()}
        return replace(link, dense=kept)

    planting.put(PoolRacLora, "merge", merge)


# ---- Factors that are computed from the last link ---------------------------------------


@defect(
    "test_a_client_computes_what_the_server_froze",
    "the basis is taken from what the server averaged, and not from what it merged and sent",
    DERIVED,
)
def basis_of_what_was_not_sent(planting: Planting) -> None:
    sound, means = SubspaceRacLora.close_round, dict[str, torch.Tensor]()

    def close_round(
        self: SubspaceRacLora, state: State, sent: RoundInstructions, uplinks: Uplinks
    ) -> State:
        after = sound(self, state, sent, uplinks)
        for name, term in (after.link or Link()).terms.items():
            if term.kept is not None:
                means[name] = term.kept
        return after

    def layer(self: SubspaceRacLora, state: State, name: str) -> Layer:
        found = LayerMethod.layer(self, state, name)
        return found if found.past is None else replace(found, past=means[name])

    planting.put(SubspaceRacLora, "close_round", close_round)
    planting.put(SubspaceRacLora, "layer", layer)


@defect(
    "test_coefficients_are_all_that_is_sent_and_counted",
    "whoever fetches a weight whole is not charged for what stands beside it",
    DERIVED,
)
def nothing_counted_beside_a_whole_weight(planting: Planting) -> None:
    planting.put(LinkSizes, "whole", property(lambda self: self.dense))


@defect(
    "test_an_update_leads_from_any_version_to_the_newest and derived",
    "what stands beside a weight is not sent with it",
    ("tests/unit/test_replica.py",),
)
def whole_weights_come_alone(planting: Planting) -> None:
    sound = WeightHistory.since

    def since(self: WeightHistory, start: int | None) -> WeightUpdate:
        update = sound(self, start)
        return replace(update, dense={n: t for n, t in update.dense.items() if not weight_of(n)})

    planting.put(WeightHistory, "since", since)


@defect(
    "test_a_link_keeps_the_leading_singular_vectors",
    "the lengths of the last link's frozen rows are forgotten when its directions are ranked",
    ("tests/methods/test_subspace_rac_lora.py", "tests/contract/test_subspace_rac_lora_rounds.py"),
)
def lengths_of_the_last_link_forgotten(planting: Planting) -> None:
    sound = past.lengths

    def forgotten(rank: int, kept: past.Kept) -> torch.Tensor:
        return sound(rank, (kept[0], 1.0))

    planting.function(past.lengths, forgotten)


# ---- Projected gradients --------------------------------------------------------------


@defect("test_steps_are_those_of_the_formula", "GaLore: projected anew in every step", GALORE)
def projected_anew_in_every_step(planting: Planting) -> None:
    sound = GaLore.step

    def step(self: GaLore, gradients: Tree) -> None:
        self.gap = 1
        sound(self, gradients)

    planting.put(GaLore, "step", step)


@defect("test_steps_are_those_of_the_formula", "GaLore: the step added without its scale", GALORE)
def projected_step_without_its_scale(planting: Planting) -> None:
    sound = Projection.add

    def whole(
        self: Projection, value: torch.Tensor, P: torch.Tensor, D: torch.Tensor, _scale: float
    ) -> None:
        sound(self, value, P, D, 1.0)

    planting.put(Projection, "add", whole)


WIRE_DEFECTS = defects_of(globals())
