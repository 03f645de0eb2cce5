"""What every method promises of whole runs: messages, local training, files and all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from worlds import (
    FORMS,
    FULL_BATCH,
    RAGGED,
    Run,
    World,
    assert_close_trees,
    assert_equal_trees,
    conv1d,
    defaults_short,
    distinct,
    equal_clients,
    every_variant,
    forms_short,
    goes_its_own_way,
    has_field,
    label,
    least_squares,
    linear,
    make_method,
    make_world,
    run,
    sends_a_shadow,
    trains_parts,
)

from fedraclora.aggregation.base import Total
from fedraclora.commands.compact import compact
from fedraclora.errors import CheckpointError
from fedraclora.protocol.method import Draw, Method, State
from fedraclora.run.rebuild import state_at, weights_at
from fedraclora.strategies.shared.factors import CoreMethod
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Tree
from fedraclora.weights.links import read_links

Variant = tuple[str, dict[str, Any]]
# Where clients train parts of a drawing in turn, no step is one of the whole.
SKETCHING = sorted(
    n
    for n in distinct()
    if has_field(make_method(n), "sketch") and not has_field(make_method(n), "interval")
)

every_method = pytest.mark.parametrize("name", sorted(distinct()))


def method_of(variant: Variant) -> Method:
    return make_method(variant[0], **variant[1])


# Runs that several tests hold others against: run once each, and read only.


@cache
def known(
    name: str, changes: tuple[tuple[str, Any], ...], keys: tuple[tuple[str, Any], ...]
) -> Run:
    return run(make_world(), make_method(name, **dict(changes)), RAGGED, **dict(keys))


def usual(variant: Variant, **keys: Any) -> Run:
    """A run of ragged clients, with the keys of `worlds.run`."""
    return known(variant[0], tuple(variant[1].items()), tuple(keys.items()))


@cache
def fedavg(momentum: float) -> Run:
    """What a method is held against whose factors span every direction."""
    local = replace(RAGGED, momentum=momentum)
    return run(make_world(), make_method("fedavg"), local, rounds=3, cohort=4)


@cache
def fedavg_without_head() -> Run:
    """The same where head and biases are frozen."""
    world = make_world(bias="frozen", head="frozen")
    return run(world, make_method("fedavg"), RAGGED, rounds=2, cohort=4)


@dataclass(frozen=True)
class WholeRun:
    """A run that was never stopped, its folder, and what the server held before each round."""

    done: Run
    folder: Path
    bases: list[Tree]
    weights: list[Tree]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], WholeRun]:
    """Runs of five rounds."""
    made: dict[str, WholeRun] = {}

    def ran(variant: Variant) -> WholeRun:
        method, folder = method_of(variant), tmp_path_factory.mktemp("whole")
        bases: list[Tree] = []
        measured: list[Tree] = []
        weights = type(method).weights

        def watched(self: Method, state: State, draw: Draw, own: Tree | None = None) -> Tree:
            found = weights(self, state, draw, own)
            if own is None:
                bases.append({n: t.clone() for n, t in state.base.items()})
                measured.append({n: t.clone() for n, t in found.items()})
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(method), "weights", watched)
            done = run(make_world(), method, RAGGED, rounds=5, cohort=3, folder=folder)
        return WholeRun(done, folder, bases, measured)

    def give(variant: Variant) -> WholeRun:
        if (name := label(variant)) not in made:
            made[name] = ran(variant)
        return made[name]

    return give


def assert_same_bits(left: Run, right: Run) -> None:
    """Equal state, weights and deterministic ledger columns."""
    assert_equal_trees(left.strategy.state.base, right.strategy.state.base)
    assert_equal_trees(left.strategy.state.carried, right.strategy.state.carried)
    assert left.strategy.state.counters == right.strategy.state.counters
    assert_equal_trees(left.weights, right.weights)
    assert left.strategy.recorder.ledger.digest() == right.strategy.recorder.ledger.digest()


# --- training ------------------------------------------------------------------------------------


# That a round of each variant begins there is shown by the loss of its first step, too.
@defaults_short
@every_variant
def test_no_local_steps_leave_the_effective_weights(variant: Variant, world: World) -> None:
    done = run(world, method_of(variant), LocalConfig(lr=0.5, steps=0), rounds=4)
    assert_close_trees(done.weights, world.base)


@every_variant
def test_a_round_starts_from_the_weights_that_the_server_holds(
    variant: Variant, world: World
) -> None:
    """The loss of a client's first step is the loss of the effective weights before the round."""
    if trains_parts(method_of(variant)):
        pytest.skip("clients have other products than the server")
    alone, seen = equal_clients(world, 1), [world.loss(world.base)]
    done = run(alone, method_of(variant), FULL_BATCH, rounds=5)
    seen += [row["metrics"]["loss"] for row in done.rows]
    rel = 1e-12 if not has_field(method_of(variant), "eps") else 1e-8  # a mean around W
    assert [row["train_loss"] for row in done.rows] == pytest.approx(seen[:-1], rel=rel)


@pytest.mark.short(when=lambda variant, layer: layer is linear or variant[0] in FORMS)
@pytest.mark.parametrize("layer", [linear, conv1d])
@every_variant
def test_the_server_ends_with_the_weights_that_a_client_trained_to(
    variant: Variant, layer: Callable[[int, int], nn.Module]
) -> None:
    """After one step the server holds W_1; a client of two steps has seen the losses of W_0, W_1.

    A scale or a layout that client and server do not share breaks the equation.
    """
    alone, method = equal_clients(make_world(layer), 1), method_of(variant)
    if sends_a_shadow(method) or trains_parts(method):
        pytest.skip("the server does not know where a client is")
    one = run(alone, method, FULL_BATCH, rounds=1)
    two = run(alone, method, replace(FULL_BATCH, steps=2), rounds=1)
    step = method.traits.step  # the server went that much further than the client
    reached = {n: w + (one.weights[n] - w) / step for n, w in alone.base.items()}
    wanted = (alone.loss(alone.base) + alone.loss(reached)) / 2
    rel = 1e-12 if not has_field(method, "eps") else 1e-8
    assert two.rows[0]["train_loss"] == pytest.approx(wanted, rel=rel)


@forms_short
@every_variant
def test_equal_clients_are_one_client(variant: Variant, world: World) -> None:
    method = method_of(variant)
    if "server_lr" in vars(method) and getattr(method, "sketches", 1) > 1:
        pytest.skip("clients of different groups train different columns")
    if goes_its_own_way(method):
        pytest.skip("each client draws directions of its own")
    local = replace(FULL_BATCH, steps=3)
    many = run(equal_clients(world, 4), method, local, rounds=4, chunk=3)
    one = run(equal_clients(world, 1), method, local, rounds=4)
    assert_close_trees(many.weights, one.weights, 1e-11)


@pytest.mark.short(when=lambda name: name in FORMS)
@every_method
def test_the_loss_falls_on_a_quadratic(name: str) -> None:
    world = least_squares()
    method = make_method(name)
    done = run(world, method, LocalConfig(lr=0.05, steps=2, batch_size=0), rounds=25, cohort=4)
    losses = [row["metrics"]["loss"] for row in done.rows]
    assert losses[0] < world.loss(world.base)
    # A core of rank 3 between fixed factors reaches 9 of the 35 directions of the weight.
    bound = 0.8 if isinstance(method, CoreMethod) else 0.75
    assert losses[-1] < bound * world.loss(world.base)


@forms_short
@every_variant
def test_a_conv1d_trains_as_the_linear_layer_that_it_transposes(variant: Variant) -> None:
    turned = make_world(conv1d)
    found = run(turned, method_of(variant), RAGGED, rounds=4, cohort=3).weights
    wanted = usual(variant, rounds=4, cohort=3).weights
    moved = {n: t.T if n in turned.plan.targets else t for n, t in found.items()}
    assert_close_trees(moved, wanted, 1e-11)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("train", ["B", "A"])
@pytest.mark.parametrize("name", SKETCHING)
def test_an_orthonormal_sketch_of_full_rank_is_fedavg(
    name: str, train: str, momentum: float, world: World
) -> None:
    full = {"rank": "full", "pool": 1, "alpha": "auto", "train": train}
    method = make_method(name, sketch="orthonormal", **full)
    local = replace(RAGGED, momentum=momentum)
    found = run(world, method, local, rounds=3, cohort=4)
    assert_close_trees(found.weights, fedavg(momentum).weights, 1e-10)


@pytest.mark.parametrize("sketch", ["gaussian", "kaiming_uniform", "srht"])
@pytest.mark.parametrize("name", SKETCHING)
def test_a_preconditioned_sketch_of_full_rank_is_fedavg(name: str, sketch: str) -> None:
    """B (A A^T)^-1 A with a square A: any A that is surely invertible will do."""
    world = make_world(bias="frozen", head="frozen")
    full = {"rank": "full", "pool": 1, "alpha": "auto", "blocks": "independent"}
    method = make_method(name, sketch=sketch, **full)
    local = replace(RAGGED, precondition=True)
    found = run(world, method, local, rounds=2, cohort=4)
    assert_close_trees(found.weights, fedavg_without_head().weights, 1e-8)


# --- determinism ---------------------------------------------------------------------------------


def shuffled(messages: list[Any]) -> list[Any]:
    return [*messages[2::-1], *messages[3:]]


@forms_short
@every_variant
def test_replies_may_come_in_any_order(variant: Variant, world: World) -> None:
    found = run(world, method_of(variant), RAGGED, rounds=4, chunk=1, arrange=shuffled)
    assert_same_bits(found, usual(variant, rounds=4, chunk=1))


# That two runs of a variant have the same bits is shown where one of them is resumed, too.
@forms_short
@every_variant
def test_the_same_seed_gives_the_same_bits(variant: Variant, world: World) -> None:
    first = usual(variant, rounds=4, cohort=3)
    again = run(world, method_of(variant), RAGGED, rounds=4, cohort=3)
    other = run(world, method_of(variant), RAGGED, rounds=4, cohort=3, seed=2)
    assert_same_bits(first, again)
    assert not torch.equal(first.weights["fc1.weight"], other.weights["fc1.weight"])


@defaults_short
@every_variant
def test_a_linear_method_is_the_same_under_the_aggregator_sum(
    variant: Variant, world: World
) -> None:
    method = method_of(variant)
    if not method.traits.linear:
        pytest.skip("needs each client's own update")
    apart = usual(variant, rounds=4, cohort=3)
    summed = run(world, method, RAGGED, rounds=4, cohort=3, aggregator=Total())
    assert_equal_trees(summed.strategy.state.base, apart.strategy.state.base)
    assert_equal_trees(summed.weights, apart.weights)


@forms_short
@every_variant
def test_uniform_weights_differ_from_examples_where_clients_do(
    variant: Variant, world: World
) -> None:
    method = method_of(variant)
    # In the first round of LoRA, B = 0 keeps A, and so a mean of A alone, almost where it was.
    examples = run(world, method, RAGGED, rounds=2)
    uniform = run(world, method, RAGGED, rounds=2, weights="uniform")
    gap = (examples.weights["fc1.weight"] - uniform.weights["fc1.weight"]).abs().max()
    assert float(gap) > 1e-6


# --- files ---------------------------------------------------------------------------------------


@defaults_short
@every_variant
def test_a_run_that_is_resumed_ends_with_the_same_bits(
    variant: Variant,
    world: World,
    whole_run: Callable[[Variant], WholeRun],
    tmp_path: Path,
) -> None:
    method, cohort, kept = method_of(variant), 3, whole_run(variant)
    whole, folder = kept.done, kept.folder
    part = tmp_path / "part"
    run(world, method, RAGGED, rounds=2, cohort=cohort, folder=part)
    rest = run(world, method, RAGGED, rounds=5, cohort=cohort, folder=part, resume=True)
    assert_same_bits(rest, whole)
    costs = [
        made.strategy.catch_up.missing(torch.arange(len(made.strategy.catch_up.versions))).tolist()
        for made in (rest, whole)
    ]
    assert costs[0] == costs[1]
    chains = [list(read_links(f / "chain")) for f in (part, folder)]
    assert [(r, meta) for r, _, meta in chains[0]] == [(r, meta) for r, _, meta in chains[1]]
    for (_, left, _), (_, right, _) in zip(*chains, strict=True):
        assert_equal_trees(left, right)


# That the chain of each variant leads to its last base is shown where its bytes are counted.
@defaults_short
@every_variant
def test_the_chain_on_disk_rebuilds_the_base_and_weights_of_every_round_to_the_bit(
    variant: Variant, whole_run: Callable[[Variant], WholeRun]
) -> None:
    kept, method = whole_run(variant), method_of(variant)
    draw = kept.done.strategy.draw
    assert len(kept.weights) >= 6
    for round_ in range(6):
        assert_equal_trees(state_at(kept.folder, round_).base, kept.bases[round_])
        wanted = kept.weights[round_]
        assert_equal_trees(weights_at(kept.folder, round_, method, draw), wanted)
    last = weights_at(kept.folder, None, method, draw)  # of the checkpoint
    assert_equal_trees(last, kept.weights[5])
    with pytest.raises(CheckpointError, match="not round 6"):
        state_at(kept.folder, 6)


@defaults_short
@every_variant
def test_a_compacted_chain_rebuilds_what_it_keeps_to_the_bit(
    variant: Variant, whole_run: Callable[[Variant], WholeRun], tmp_path: Path
) -> None:
    method, folder = method_of(variant), whole_run(variant).folder
    shutil.copytree(folder / "chain", tmp_path / "chain")
    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    assert compact(tmp_path, 2).rounds == "0 to 4 in steps of 2, 5"
    for round_ in (0, 2, 4, 5):
        before, after = (state_at(place, round_, method=method) for place in (folder, tmp_path))
        assert_equal_trees(after.base, before.base)
        assert_equal_trees(after.carried, before.carried)
        assert after.counters == before.counters


@forms_short
@every_variant
def test_the_initial_weights_of_a_world_are_never_written_to(variant: Variant) -> None:
    fresh, used = make_world(), make_world()
    run(used, method_of(variant), RAGGED, rounds=4)
    assert_equal_trees(used.base, fresh.base)
    parameters = {n: p.detach() for n, p in used.task.model.named_parameters()}
    assert_equal_trees(parameters, fresh.base)


@pytest.mark.parametrize(("penalty", "share"), [(50.0, 1.0), (1e-3, 0.0)])
def test_components_that_no_client_kept_are_in_the_ledger(
    penalty: float, share: float, world: World
) -> None:
    """Where all gates close, the weights stay as they were."""
    local = replace(RAGGED, gate_penalty=penalty)
    done = run(world, make_method("fed_rac_lora"), local, rounds=2)
    assert [row["pruned"] for row in done.rows] == [share, share]
    still = [torch.equal(done.weights[n], world.base[n]) for n in world.plan.targets]
    assert set(still) == {share == 1.0}
    assert "pruned" not in run(world, make_method("fed_rac_lora"), RAGGED, rounds=1).rows[0]
