"""Clients with rank budgets: as the one-client loop on factors that are really cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vectorized_agreement import LOCAL, assert_agrees, base_of, foldable, method_of, trainer_of
from vectorized_cases import CASES, SEED, SIZES, Case, convolution, mlp
from vectorized_settings import (
    A_FEW,
    FORMS,
    LAYERS,
    MEETING,
    PROJECTED,
    SETTINGS,
    adapters_of,
    trained_in,
)

from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, Cohort, Draw, Method, RoundInstructions
from fedraclora.protocol.rank_budgets import trainable
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.tree import Layout

RANKS = torch.tensor([1, 3, 2, 9, 1, 2])  # of each client; the method's rank is 3
ONE_TRAINED = [f for f in FORMS if len(f) == 2 or trained_in(f) == 1]
EVERY_SETTING = SETTINGS | PROJECTED
ALONE = {"momentum", "decay", "clip", "prox", "dp", "adamw", "full-batch-steps"}  # parts of others


def run(case: Case, method: Method, local: LocalSettings, rounds: int, check: set[int]) -> None:
    """Run a method under budgets; hold the rounds of ``check`` against the oracle."""
    plan, draw = case.plan(), Draw(SEED)
    state = method.initial_state(base_of(case.task), plan, draw)
    trainer = trainer_of(case.task, plan, local)
    for round_ in range(1, rounds + 1):
        clients = draw_cohort(SEED, round_, len(SIZES), 5)
        budgets = RANKS[clients] if method.traits.ranks else None
        cohort = Cohort(clients, torch.ones(5), budgets)
        sent = method.open_round(state, round_, cohort, draw)
        assert sent.ranks is not None
        if round_ in check:
            assert_agrees(case, plan, local, state.base, sent, clients, round_=round_)
        result = trainer.train(state.base, sent, clients, round_=round_, rate_scale=1.0)
        masks = trainable(sent, sent.ranks)
        assert masks
        for name, mask in masks.items():
            slot, value = sent.trained()[name], result.trained[name]
            opening = slot.opening()
            start = torch.zeros(slot.shape) if opening is None else opening
            beyond = (~mask).expand_as(value)
            assert torch.equal(value[beyond], start.expand_as(value)[beyond].to(value)), name
            moved = (value != start)[mask.expand_as(value)]
            assert float(moved.double().mean()) > 0.5, name  # all, but for units that are off
        layout = Layout(tuple((n, s.shape) for n, s in sent.uploaded().items()))
        rows = layout.pack({n: result.trained[n] for n, _ in layout.shapes}, lead=1)
        state = method.close_round(
            state, sent, Uplinks(clients, result.samples.to(torch.float64), layout, rows)
        )


# Of settings that a few others hold together, those; the preconditioner on the other train.
@pytest.mark.short(
    when=lambda train, setting: setting not in ALONE and (train == "A") == (setting in PROJECTED)
)
@pytest.mark.parametrize("train", ["B", "A"])
@pytest.mark.parametrize("setting", EVERY_SETTING)
def test_every_local_setting(setting: str, train: str) -> None:
    """The third round starts from a carried factor, of which decay and momentum see a part."""
    local = replace(LOCAL, **EVERY_SETTING[setting])  # type: ignore[arg-type]
    method = method_of("fed_rac_lora", train=train, sketch="gaussian", merge_every=3)
    run(CASES["mlp"](), method, local, rounds=3, check={1, 3})


# Where a client's components begin is no matter of the setting: those that meet most others.
@pytest.mark.short(when=lambda train, setting: setting in (MEETING if train == "A" else PROJECTED))
@pytest.mark.parametrize("train", ["B", "A"])
@pytest.mark.parametrize("setting", EVERY_SETTING)
def test_parts_of_one_sketch(setting: str, train: str) -> None:
    """Groups are clients with budgets that begin elsewhere; the server step moves the start."""
    local = replace(LOCAL, **EVERY_SETTING[setting])  # type: ignore[arg-type]
    changes = {"train": train, "sketch": "gaussian", "merge_every": 3}
    method = method_of("fed_rac_lora", rank=2, sketches=2, server_lr=1.5, **changes)
    run(CASES["mlp"](), method, local, rounds=3, check={1, 3})


@pytest.mark.short(when=lambda case, name: name == "fed_rac_lora" or case == "mlp")
@pytest.mark.parametrize("name", ["fed_rac_lora", "ffa_lora"])
@pytest.mark.parametrize("case", ["mlp", "cnn-adapted", "bert-query-value", "gpt2", "reader"])
def test_every_layer_kind(case: str, name: str) -> None:
    run(CASES[case](), method_of(name, train="auto"), LOCAL, rounds=2, check={1, 2})


def test_what_falls_back_to_vmap() -> None:
    case = Case(convolution(padding=1, padding_mode="circular"), targets="all")
    method, plan = method_of("ffa_lora"), case.plan()
    state = method.initial_state(base_of(case.task), plan, Draw(SEED))
    cohort = Cohort(torch.arange(2), torch.ones(2), torch.tensor([1, 2]))
    assert not foldable(case, method.open_round(state, 1, cohort, Draw(SEED)))
    run(case, method, replace(LOCAL, weight_decay=0.1, clip=0.5), rounds=2, check={1, 2})


# The cut is of factors, whatever the layer.
@pytest.mark.short(when=lambda kind, forms: kind == "linear" or forms in A_FEW)
@pytest.mark.parametrize("forms", ONE_TRAINED, ids="-".join)
@pytest.mark.parametrize("kind", LAYERS)
def test_factors_of_every_form(kind: str, forms: tuple[str, ...]) -> None:
    """Both factors trained, one per client, three of them: cut where they meet."""
    make, names = LAYERS[kind]
    case = Case(make(), targets=",".join(n.removesuffix(".weight") for n in names), head="lora")
    plan = case.plan()
    ranks = torch.tensor([1, 2, 1, 3, 1, 2])
    downlink = RoundInstructions(adapters_of(forms, names, plan.targets), ranks=ranks)
    local = replace(LOCAL, lr=0.05, weight_decay=0.1, momentum=0.5)
    clients = torch.arange(len(SIZES))
    assert_agrees(case, plan, local, base_of(case.task), downlink, clients)


@pytest.mark.parametrize("forms", [f for f in FORMS if len(f) == 2], ids="-".join)
def test_prox_and_preconditioner_with_factors_of_every_form(forms: tuple[str, ...]) -> None:
    case = Case(mlp(), targets="fc1,fc2", head="full")
    plan = case.plan()
    dense = {n: to_train(plan.shapes[n], main=False) for n in plan.dense}
    adapters = adapters_of(forms, ("fc1.weight", "fc2.weight"), plan.targets)
    downlink = RoundInstructions(adapters, dense, ranks=torch.tensor([1, 2, 1, 3, 1, 2]))
    local = replace(LOCAL, lr=0.02, prox=0.4, precondition=trained_in(forms) == 1, momentum=0.5)
    assert_agrees(case, plan, local, base_of(case.task), downlink, torch.arange(len(SIZES)))


@pytest.mark.parametrize("setting", ["decay", "adamw-decay-clip", "precondition-prox-clip"])
def test_budgets_of_the_whole_rank_are_no_budgets_to_the_bit(setting: str) -> None:
    case = CASES["bert-query-value"]()
    local = replace(LOCAL, **EVERY_SETTING[setting])  # type: ignore[arg-type]
    method, plan, clients = method_of("fed_rac_lora"), case.plan(), torch.arange(len(SIZES))
    state = method.initial_state(base_of(case.task), plan, Draw(SEED))
    weights = torch.ones(len(SIZES))
    trained = []
    for ranks in (None, torch.full((len(SIZES),), 3), torch.arange(3, 3 + len(SIZES))):
        sent = method.open_round(state, 1, Cohort(clients, weights, ranks), Draw(SEED))
        result = trainer_of(case.task, plan, local).train(
            state.base, sent, clients, round_=1, rate_scale=1.0
        )
        trained.append(result.trained)
    for name, value in trained[0].items():
        assert torch.equal(trained[1][name], value), name
        assert torch.equal(trained[2][name], value), name


def test_a_small_budget_is_a_small_adapter_under_the_first_rows_of_the_sketch() -> None:
    case = CASES["mlp"]()
    plan, clients = case.plan(), torch.arange(len(SIZES))
    method = method_of("fed_rac_lora", rank=4, sketch="gaussian")
    state = method.initial_state(base_of(case.task), plan, Draw(SEED))
    budget = Cohort(clients, torch.ones(len(SIZES)), torch.full((len(SIZES),), 2))
    sent = method.open_round(state, 1, budget, Draw(SEED))
    small = {}
    for name, adapter in sent.adapters.items():
        sketched = adapter.factors["A"]
        B = to_train((plan.targets[name].shape[0], 2))
        small[name] = Adapter.of({"B": B, "A": sketched.draw()[:2]}, adapter.scale)
    trainer = trainer_of(case.task, plan, replace(LOCAL, precondition=True, prox=0.3))
    found, wanted = (
        trainer.train(state.base, d, clients, round_=1, rate_scale=1.0).trained
        for d in (sent, RoundInstructions(small, sent.dense))
    )
    for name in plan.targets:
        B = found[f"{name}/B"]
        assert torch.count_nonzero(B[..., 2:]) == 0
        torch.testing.assert_close(B[..., :2], wanted[f"{name}/B"], rtol=0, atol=1e-12)
