"""Defects of what stands beside the methods: server optimizers, control variates, buffers.

Each names the law that it breaks, by the name of the test that must find it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import fedraclora.strategies.steps.scaffold
from fedraclora.aggregation.server_optimizers import Adaptive, Momentum, ServerOptimizer, Yogi
from fedraclora.clients.client_state import restore
from fedraclora.protocol.change_of_basis import transported
from fedraclora.protocol.factor import adapted_weight
from fedraclora.protocol.method import RoundInstructions, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.buffered import ReplyBatch, batch_of, merge
from fedraclora.strategies.steps.fedopt import step_in_weights
from fedraclora.training.extras.variates import (
    end_variates,
    is_lifted,
    moved_by,
    variates_of,
    with_variates,
)
from fedraclora.training.optimizer import correcting, mean_gradients
from fedraclora.tree import Tree
from tests.campaigns.planting import Planting, defect, defects_of

OPTIMIZERS = ("tests/contract/test_server_optimizers.py",)
DRIFT = ("tests/contract/test_control_variates.py",)
BUFFERED = ("tests/contract/test_buffered_rounds.py",)
IN_WEIGHTS = "test_in_weights_the_server_follows_the_mean_of_the_clients_weights"
IN_FACTORS = "test_in_factors_momentum_is_projected_on_what_the_round_trains"
SCAFFOLD = "test_a_run_is_scaffold_on_the_weights_that_it_trains"
STEP = "test_every_step_is_the_discounted_mean_of_what_came"

Advanced = tuple[Tree, Tree]


# ---- Server optimizers ----------------------------------------------------------------


@defect(
    f"{IN_WEIGHTS} and momentum",
    "FedAvgM: the velocity is not carried from round to round",
    OPTIMIZERS,
)
def server_momentum_forgotten(planting: Planting) -> None:
    sound = Momentum.advance
    planting.put(Momentum, "advance", lambda self, *given: sound(replace(self, beta=0.0), *given))


@defect(f"{IN_WEIGHTS} and adam", "FedAdam: the last change scaled by V alone", OPTIMIZERS)
def first_moment_forgotten(planting: Planting) -> None:
    sound = Adaptive.advance
    planting.put(Adaptive, "advance", lambda self, *given: sound(replace(self, beta1=0.0), *given))


@defect(
    f"{IN_WEIGHTS} and adam",
    "Flower's FedAdam: the first rounds corrected, which algorithm 2 of FedOpt has not",
    OPTIMIZERS,
)
def moments_corrected_as_adam_does(planting: Planting) -> None:
    sound = Adaptive.advance

    def advance(self: Adaptive, change: Tree, moments: Tree) -> Advanced:
        steps, new = sound(self, change, moments)
        begun = {n: 1.0 if f"first/{n}" in moments else 1 - self.beta1 for n in steps}
        return {n: t / begun[n] for n, t in steps.items()}, new

    planting.put(Adaptive, "advance", advance)


@defect(
    f"{IN_WEIGHTS} and adagrad",
    "Flower's FedOpt: V begins at 0, where the paper has tau^2",
    OPTIMIZERS,
)
def second_moment_begins_at_nothing(planting: Planting) -> None:
    sound = Adaptive.advance

    def advance(self: Adaptive, change: Tree, moments: Tree) -> Advanced:
        nothing = {f"second/{n}": torch.zeros_like(t) for n, t in change.items()}
        return sound(self, change, nothing | moments)

    planting.put(Adaptive, "advance", advance)


@defect(f"{IN_WEIGHTS} and yogi", "FedYogi: sign(Delta^2 - V)", OPTIMIZERS)
def yogi_moves_the_wrong_way(planting: Planting) -> None:
    def second(self: Yogi, old: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return old - (1 - self.beta2) * square * torch.sign(square - old)

    planting.put(Yogi, "second", second)


@defect(f"{IN_WEIGHTS} and adam", "an optimizer that is made anew in each round", OPTIMIZERS)
def server_moments_begin_anew(planting: Planting) -> None:
    sound = Adaptive.advance
    planting.put(Adaptive, "advance", lambda self, change, moments: sound(self, change, {}))


@dataclass(frozen=True)
class Beside:
    """A server optimizer that steps beside the mean, in the place of stepping instead of it."""

    rule: ServerOptimizer

    def advance(self, change: Tree, moments: Tree) -> Advanced:
        """Give the sum of both steps."""
        steps, new = self.rule.advance(change, moments)
        return {n: change[n] + t for n, t in steps.items()}, new


@defect(
    f"{IN_WEIGHTS} and momentum",
    "resets nothing: the mean is merged, and the server's step is added",
    OPTIMIZERS,
)
def server_steps_beside_the_mean(planting: Planting) -> None:
    def beside(rule: ServerOptimizer, *given: Any) -> State:
        return step_in_weights(Beside(rule), *given)  # type: ignore[arg-type]

    planting.function(step_in_weights, beside)


@defect(IN_FACTORS, "momentum of B under one A added under another", OPTIMIZERS)
def momentum_left_beside_the_old_sketch(planting: Planting) -> None:
    planting.function(transported, lambda label, trained, old, new: trained)


@defect(IN_FACTORS, "B A_old A_new^T, which is right for orthonormal rows alone", OPTIMIZERS)
def momentum_moved_without_the_gram(planting: Planting) -> None:
    def moved(
        label: str, trained: torch.Tensor, old: torch.Tensor, new: torch.Tensor
    ) -> torch.Tensor:
        if label == "A":
            return moved("B", trained.T, old.T, new.T).T
        return trained @ (old @ new.T)

    planting.function(transported, moved)


# ---- Control variates -----------------------------------------------------------------


def opposed(sent: RoundInstructions) -> RoundInstructions:
    return changed(sent, torch.neg)


def changed(
    sent: RoundInstructions, change: Callable[[torch.Tensor], torch.Tensor]
) -> RoundInstructions:
    variates = {n: change(t) for n, t in variates_of(sent).items()}
    return with_variates(sent, variates, lifted=is_lifted(sent))


@defect(SCAFFOLD, "SCAFFOLD: g + c_k - c", DRIFT)
def correction_of_the_wrong_sign(planting: Planting) -> None:
    def turned(*given: Any) -> tuple[RoundInstructions, Tree, Tree]:
        sent, moments, residues = restore(*given)
        return opposed(sent), moments, residues

    planting.function(restore, turned)


@defect(
    "test_the_batch_of_clients_adds_what_the_one_client_loop_adds",
    "SCAFFOLD: the correction subtracted from the gradient",
    DRIFT,
)
def correction_taken_away(planting: Planting) -> None:
    def away(sent: RoundInstructions, order: torch.Tensor) -> Callable[[Tree], Tree]:
        return correcting(opposed(sent), order)

    planting.function(correcting, away)


@defect(SCAFFOLD, "option II: c_k <- (x - y) / (K eta), without c_k - c", DRIFT)
def correction_counted_as_gradient(planting: Planting) -> None:
    def end(kept: Tree, sent: RoundInstructions, directions: Tree) -> Tree:
        return end_variates(kept, changed(sent, torch.zeros_like), directions)

    planting.function(end_variates, end)


@defect(SCAFFOLD, "a variate of B kept as it is while A is drawn anew", DRIFT)
def variates_in_the_coordinates_of_the_old_sketch(planting: Planting) -> None:
    sound = fedraclora.strategies.steps.scaffold.keeps_dense_variates

    def never(*given: Any) -> bool:
        sound(*given)
        return False

    planting.put(fedraclora.strategies.steps.scaffold, "keeps_dense_variates", never)


@defect(SCAFFOLD, "a gradient of B taken for one of the weight: alpha / r is forgotten", DRIFT)
def variates_lifted_without_the_scale(planting: Planting) -> None:
    def moved(kept: Tree, sent: RoundInstructions, *given: Any) -> Tree:
        out = moved_by(kept, sent, *given)
        for weight, adapter in sent.adapters.items():
            if (key := f"variates/{weight}") in out:
                out[key] = kept[key] + adapter.scale * (out[key] - kept[key])
        return out

    planting.function(moved_by, moved)


def close_with(planting: Planting, counted: Callable[[float], float]) -> None:
    """Move the server's variates by another share than that of the cohort."""
    sound = fedraclora.strategies.steps.scaffold.close_corrected

    def close(*given: Any) -> Tree:
        *before, share = given
        return sound(*before, counted(share))

    planting.put(fedraclora.strategies.steps.scaffold, "close_corrected", close)


@defect(
    SCAFFOLD,
    "c replaced by the mean over the cohort, whatever share of the clients that is",
    DRIFT,
)
def cohort_taken_for_everyone(planting: Planting) -> None:
    close_with(planting, lambda share: 1.0)


@defect(
    SCAFFOLD,
    "the mean taken over all clients, then weighted by the cohort's share once more",
    DRIFT,
)
def cohort_counted_twice(planting: Planting) -> None:
    close_with(planting, lambda share: share**2)


@defect(SCAFFOLD, "(x - y) / eta, the sum of K gradients", DRIFT)
def steps_forgotten_in_the_mean_gradient(planting: Planting) -> None:
    def summed(start: Tree, end: Tree, steps: int, rates: dict[str, float]) -> Tree:
        return mean_gradients(start, end, 1, rates)

    planting.function(mean_gradients, summed)


# ---- What a state may hold ------------------------------------------------------------


@defect(
    "layers_are_too_large_by_themselves",
    "norms of all layers multiplied with one another: a deep model is refused at any step size",
    ("tests/contract/test_deep_models.py",),
)
def layers_counted_as_one(planting: Planting) -> None:
    planting.function(adapted_weight, lambda name, weights: "")


# ---- Buffered rounds ------------------------------------------------------------------


@defect(f"{STEP} and fed_rac_lora", "B trained under A_t merged with A_(t + tau)", BUFFERED)
def stale_factor_beside_the_new_sketch(planting: Planting) -> None:
    def beside(
        method: Any, state: State, batches: list[ReplyBatch], now: RoundInstructions, round_: int
    ) -> State:
        fresh = [replace(b, sent=replace(now, link=b.sent.link)) for b in batches]
        return merge(method, state, fresh, now, round_)

    planting.function(merge, beside)


def merged_otherwise(
    planting: Planting, change: Callable[[list[ReplyBatch], int], list[ReplyBatch]]
) -> None:
    """Change the replies that the server is about to merge."""

    def otherwise(
        method: Any, state: State, batches: list[ReplyBatch], now: RoundInstructions, round_: int
    ) -> State:
        return merge(method, state, change(batches, round_), now, round_)

    planting.function(merge, otherwise)


@defect(STEP, "FedBuff: s(tau) = 1", BUFFERED)
def stale_replies_count_in_full(planting: Planting) -> None:
    merged_otherwise(planting, lambda batches, now: [replace(b, round_=now) for b in batches])


@defect(
    STEP,
    "a mean by discounted weights: a buffer of stale replies moves as far as one of fresh ones",
    BUFFERED,
)
def discount_divided_out_again(planting: Planting) -> None:
    def lengthened(batches: list[ReplyBatch], now: int) -> list[ReplyBatch]:
        whole = [float(b.weights.sum()) for b in batches]
        left = [w / (1 + now - b.round_) ** 0.5 for w, b in zip(whole, batches, strict=True)]
        return [replace(b, rows=b.rows * (sum(whole) / sum(left))) for b in batches]

    merged_otherwise(planting, lengthened)


@defect(
    f"{STEP} and (ffa_lora or fedavg)",
    "a reply taken for what the client ends with, not for what it has changed",
    BUFFERED,
)
def stale_weights_in_the_place_of_changes(planting: Planting) -> None:
    def whole(uplinks: Uplinks, *given: Any) -> ReplyBatch:
        return replace(batch_of(uplinks, *given), rows=uplinks.rows().cpu())

    planting.function(batch_of, whole)


@defect(
    f"{STEP} and ffa_lora", "resets nothing: what was merged lies in the buffer still", BUFFERED
)
def buffer_never_emptied(planting: Planting) -> None:
    merged: list[ReplyBatch] = []

    def again(batches: list[ReplyBatch], _now: int) -> list[ReplyBatch]:
        merged.extend(batches)
        return [*merged]

    merged_otherwise(planting, again)


SERVER_DEFECTS = defects_of(globals())
