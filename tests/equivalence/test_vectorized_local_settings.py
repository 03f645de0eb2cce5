"""A batch of clients comes to what each comes to alone: under every local setting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vectorized_agreement import ATOL, KINDS, LOCAL, assert_agrees, base_of, method_of, run
from vectorized_cases import CASES, SEED, SIZES
from vectorized_settings import ALSO, MEETING, PAIRED_METHODS, PROJECTED, SETTINGS, WIDELY

from fedraclora.protocol.method import Cohort, Draw


@pytest.mark.short(
    when=lambda name, setting: name in WIDELY or (name in ALSO and setting in MEETING)
)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", KINDS)
def test_every_local_setting(name: str, setting: str) -> None:
    case, local = CASES["mlp"](), replace(LOCAL, **SETTINGS[setting])  # type: ignore[arg-type]
    method = method_of(name, sketch="gaussian", blocks="independent")
    state = method.initial_state(base_of(case.task), case.plan(), Draw(SEED))
    cohort = Cohort(torch.arange(len(SIZES)), torch.ones(len(SIZES)))
    sent = method.open_round(state, 1, cohort, Draw(SEED))
    if local.prox and sent.program.forms_gradients:
        pytest.skip("there is no gradient to which the proximal term is added; a run refuses it")
    run(case, method, local, rounds=2, check={2})


@pytest.mark.parametrize("setting", PROJECTED)
@pytest.mark.parametrize("trained", ["B", "A", "in-turn"])
def test_a_preconditioner_by_the_factor_that_is_frozen(trained: str, setting: str) -> None:
    # A gaussian sketch: with orthonormal rows the preconditioner would be the identity.
    name, changes = PAIRED_METHODS[trained]
    local = replace(LOCAL, **PROJECTED[setting])  # type: ignore[arg-type]
    run(CASES["mlp"](), method_of(name, **changes), local, rounds=2, check={1, 2})


@pytest.mark.parametrize("train", ["B", "A"])
def test_preconditioner_and_prox_on_either_side(train: str) -> None:
    # Small steps: the drawn factor of the last layer is square and nearly singular, so that a long
    # step of its preconditioner makes rounding as large as the bound.
    local = replace(LOCAL, lr=0.001, precondition=True, prox=0.3)
    method = method_of("fed_rac_lora", train=train, sketch="gaussian", merge_every=None)
    run(CASES["cnn-adapted"](), method, local, rounds=2, check={2})


def test_the_schedule_scales_both_rates() -> None:
    case = CASES["mlp"]()
    method, plan = method_of("fed_rac_lora"), case.plan()
    state = method.initial_state(base_of(case.task), plan, Draw(SEED))
    clients = torch.arange(len(SIZES))
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(SIZES))), Draw(SEED))
    slow = assert_agrees(case, plan, LOCAL, state.base, sent, clients, rate_scale=0.25)
    lower = replace(LOCAL, lr=0.25 * 0.2, full_lr=0.25 * 0.1)
    same = assert_agrees(case, plan, lower, state.base, sent, clients)
    for name, value in slow.items():
        torch.testing.assert_close(value, same[name], rtol=0, atol=ATOL)


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"steps": 0}])
def test_no_step_changes_nothing(setting: dict[str, int]) -> None:
    case = CASES["mlp"]()
    method, plan = method_of("fedavg_lora"), case.plan()
    state = method.initial_state(base_of(case.task), plan, Draw(SEED))
    clients = torch.arange(len(SIZES))
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(SIZES))), Draw(SEED))
    local = replace(LOCAL, **setting)  # type: ignore[arg-type]
    kept = assert_agrees(case, plan, local, state.base, sent, clients)
    start = sent.trained()["fc1.weight/A"].opening()
    assert start is not None
    assert torch.equal(kept["fc1.weight/A"][2], start)
