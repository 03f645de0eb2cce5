"""What goes with what a method asks of its clients, and what is refused since it would not act."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from worlds import (
    RAGGED,
    UNEQUAL,
    World,
    assert_close_trees,
    assert_equal_trees,
    defaults_short,
    every_variant,
    label,
    make_method,
    play,
    play_rounds,
    run,
    some_cohort,
)

from fedraclora.allocation import HeteroLora
from fedraclora.compatibility import Features
from fedraclora.devices.distributions import Constant
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.protocol.method import Cohort, Draw, Method
from fedraclora.strategies.runner import mean_floats
from fedraclora.strategies.server.device_simulator import DeviceSimulator
from fedraclora.strategies.wrappers.allocated import allocated
from fedraclora.strategies.wrappers.dora import Dora
from fedraclora.training.localconfig import LocalConfig
from tests.common import accepted
from tests.messages import unpack_downlink

Variant = tuple[str, dict[str, Any]]
DRAW = Draw(seed=17)
LINKS = LocalConfig(lr=0.1, steps=2, batch_size=4, momentum=0.5, optimizer_state="run")


@defaults_short
@every_variant
def test_a_method_says_whether_what_clients_train_varies(variant: Variant, world: World) -> None:
    name, changes = variant
    method = make_method(name, **changes)
    done = run(world, method, RAGGED, rounds=6, cohort=2)
    asked = []
    for content in done.worker.asked:
        downlink, _ = unpack_downlink(content)
        if downlink.program.trains:
            shapes = {n: tuple(slot.shape) for n, slot in downlink.trained().items()}
            asked.append(shapes)
    alike = all(shapes == asked[0] for shapes in asked)
    assert method.traits.varies or alike, "what is trained changes: say varies=True in its traits"


VARYING = [
    ("rolora", {}),
    ("bernoulli_lora", {}),
    ("xgblora", {}),
    ("slora", {"sparse_rounds": 1}),
]


@pytest.mark.parametrize("variant", VARYING, ids=label)
def test_moments_of_other_tensors_are_not_handed_on(variant: Variant, world: World) -> None:
    name, changes = variant
    with pytest.raises(ConfigError, match=r"different tensors .*local\.optimizer_state=run"):
        run(world, make_method(name, **changes), LINKS, rounds=2)
    some = replace(LINKS, optimizer_state="merge", optimizer_state_kept=0.5)
    with pytest.raises(ConfigError, match=r"local.optimizer_state_kept=0.5"):
        run(world, make_method(name, **changes), some, rounds=2)
    often = allocated(make_method("fed_rac_lora"), HeteroLora(share=0.67, every=1))
    with pytest.raises(ConfigError, match=r"local.optimizer_state=round or merge"):
        run(world, often, LINKS, rounds=2)
    run(world, make_method("fedavg_lora"), LINKS, rounds=2)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARYING, ids=label)
def test_moments_end_with_their_link_where_other_tensors_are_trained(
    variant: Variant, world: World, tmp_path: Path
) -> None:
    """Links of one round: the run is that of moments of a round, and it is resumed to the bit."""
    name, changes = variant
    link, rounds = replace(LINKS, optimizer_state="merge"), 6
    for method in (
        make_method(name, **changes),
        allocated(make_method("fed_rac_lora"), HeteroLora(share=0.67, every=1)),
    ):
        more: dict[str, Any] = {"rounds": rounds, "cohort": 3}
        found = run(world, method, link, **more)
        if name != "slora":  # its second stage is one link
            wanted = run(world, method, replace(link, optimizer_state="round"), **more)
            assert_equal_trees(found.weights, wanted.weights)
        folder = tmp_path / type(method).__name__
        run(world, method, link, **more | {"rounds": 3}, folder=folder)
        rest = run(world, method, link, **more, folder=folder, resume=True)
        assert_equal_trees(found.weights, rest.weights)
        assert_equal_trees(found.worker.store.state(), rest.worker.store.state())


@pytest.mark.parametrize("name", ["slora", "ravan"])
def test_noise_on_what_must_stay_is_refused(name: str, world: World) -> None:
    private = {"privacy": ClientLevel(clip=0.5, delta=0.01)}
    with pytest.raises(ConfigError, match="numbers that it never trains"):
        run(world, make_method(name), RAGGED, rounds=1, weights="uniform", treatment=private)


def test_decay_of_what_a_mask_leaves_alone_is_refused(world: World) -> None:
    method, decay = make_method("slora", density=0.2), LocalConfig(lr=0.1, weight_decay=0.01)
    with pytest.raises(ConfigError, match=r"local\.weight_decay=0\.01.: decay would"):
        run(world, method, decay, rounds=1)
    run(world, make_method("ravan"), decay, rounds=1)  # beside its blocks is zero, and stays so
    moved = run(world, method, RAGGED, rounds=1).weights
    for weight in world.plan.targets:
        kept = int((moved[weight] == world.base[weight]).sum())
        assert 0 < kept < moved[weight].numel(), weight


@pytest.mark.parametrize("rank", [3, 6])
def test_fedsvd_keeps_as_many_orthonormal_rows_as_its_rank(rank: int, world: World) -> None:
    """Also where a layer has fewer outputs than the rank: its B A has fewer singular values."""
    assert min(view.shape[0] for view in world.plan.targets.values()) < 6
    for played in play_rounds(make_method("fedsvd", rank=rank), world, 3, DRAW):
        for weight in played.sent.adapters:
            A = played.after.carried[f"{weight}/A"]
            torch.testing.assert_close(A @ A.mT, torch.eye(len(A), dtype=A.dtype))
            if f"{weight}/A" in played.before.carried:
                old = played.before.carried[f"{weight}/A"]
                torch.testing.assert_close(A @ old.mT @ old, A)  # the span is that of before


def test_components_that_nobody_has_stay_under_hetlora(world: World) -> None:
    method = make_method("hetlora", rank=3)
    state = method.initial_state(world.base, world.plan, DRAW)
    for round_, budgets in enumerate(([1, 2, 1, 1], [3, 1, 2, 2], [1, 1, 1, 1]), start=1):
        ranks = torch.tensor(budgets)
        cohort = Cohort(some_cohort().clients, torch.tensor(UNEQUAL, dtype=torch.float64), ranks)
        played = play(method, world, state, round_, cohort, DRAW)
        most = max(budgets)
        for weight in played.sent.adapters:
            B, A = (played.after.carried[f"{weight}/{k}"] for k in ("B", "A"))
            assert bool(A[most:].abs().sum(dim=1).gt(0).all())  # else they could never move again
            if state.carried:
                torch.testing.assert_close(A[most:], state.carried[f"{weight}/A"][most:])
                torch.testing.assert_close(B[:, most:], state.carried[f"{weight}/B"][:, most:])
        state = played.after


def test_a_residual_is_no_larger_than_it_must_be(world: World) -> None:
    """(K - 1) r components are all that it has, however many are allowed."""
    sent = {
        cut: play_rounds(make_method("fedex_lora", rank=1, residual_rank=cut), world, 1, DRAW)[0]
        for cut in (None, 50)
    }
    cut, whole = sent[50].after.link, sent[None].after.link
    assert cut is not None
    assert whole is not None
    for weight, term in cut.terms.items():
        wanted = [tuple(f.shape) for f in whole.terms[weight].factors]
        assert [tuple(f.shape) for f in term.factors] == wanted
    assert_close_trees(sent[50].after.base, sent[None].after.base, 1e-12)


def test_probes_are_not_clipped(world: World) -> None:
    """LoRA-GA begins from the gradient that the server would see, whatever steps are cut to."""
    method = make_method("fedavg_lora", rank=2, init="lora_ga")
    plain, cut = (
        run(world, method, LocalConfig(lr=0.1, steps=2, batch_size=4, clip=clip), rounds=1)
        for clip in (None, 0.01)
    )
    assert_equal_trees(cut.strategy.state.carried, plain.strategy.state.carried)


def test_bernoulli_lora_looks_at_both_sides_before_it_begins(world: World) -> None:
    for coins in range(4):
        with pytest.raises(ConfigError, match="rank"):
            make_method("bernoulli_lora", rank=6, cap=False, coins=coins).initial_state(
                world.base, world.plan, DRAW
            )
        notes = make_method("bernoulli_lora", rank=6, coins=coins).initial_state(
            world.base, world.plan, DRAW
        )
        assert notes.notes


def test_the_summary_counts_the_numbers_of_a_mean_round(world: World) -> None:
    method = make_method("rolora")
    each = [method.floats(world.plan, t) for t in (1, 2, 3)]

    def beginning(chosen: Method) -> Any:
        state = chosen.initial_state(world.base, world.plan, DRAW)
        return SimpleNamespace(strategy=SimpleNamespace(method=chosen, state=state))

    assert mean_floats(beginning(method), 3) == tuple(
        pytest.approx(sum(numbers) / 3, abs=0.06) for numbers in zip(*each, strict=True)
    )
    same = make_method("fed_rac_lora")
    assert mean_floats(beginning(same), 7) == same.floats(world.plan)
    assert mean_floats(beginning(same), 0) == same.floats(world.plan)


@pytest.mark.parametrize("name", ["fed_rac_lora", "fedkrso"])
def test_groups_do_not_change_the_step_of_a_part(name: str, world: World) -> None:
    """E[A^T A] = I of each part: lr s^2 c is n / r, in however many parts the drawing is cut."""
    for sketches in (1, 2, 3):
        method = make_method(name, rank=1, alpha="auto", sketches=sketches, normalize="identity")
        sent = method.open_round(
            method.initial_state(world.base, world.plan, DRAW), 1, some_cohort(), DRAW
        )
        for weight, adapter in sent.adapters.items():
            n = world.plan.targets[weight].shape[1]
            drawn = adapter.factors["A"].drawing
            assert drawn is not None
            assert math.isclose(adapter.scale**2 * drawn.gram_scale, n)


def test_a_side_without_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.zero_init=A has no effect"):
        accepted("method", make_method("fedavg_lora", init="pissa", zero_init="A"))


def test_rank_budgets_are_shares_of_the_rank_under_magnitudes_too() -> None:
    devices = DeviceSimulator(SystemConfig(rank_budget=Constant(0.5)), 1, LINKS)
    method = make_method("ffa_lora", rank=6)
    assert not [*Features([devices.system, method, Dora(method)]).conflicts()]
    ranks = devices.ranks(torch.arange(3), Dora(method))
    assert ranks is not None
    assert ranks.tolist() == [3, 3, 3]
    chosen = Features([devices.system, method, allocated(method, HeteroLora())]).conflicts()
    assert any("one rank" in said and "allocation=none" in said for said in chosen)


@every_variant
def test_a_method_says_whether_something_stays_at_clients(variant: Variant, world: World) -> None:
    method = make_method(variant[0], **variant[1])
    factors = [
        factor
        for played in play_rounds(method, world, 3, Draw(1))
        for factor in played.sent.factors().values()
    ]
    stays = [f for f in factors if f.trained and not f.upload]
    assert method.client_state == bool(stays)
