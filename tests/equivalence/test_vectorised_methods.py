"""A batch of clients comes to what each comes to alone: every method, and any cohort."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from vectorised_agreement import (
    KINDS,
    LOCAL,
    agreed,
    assert_agrees,
    base_of,
    method_of,
    run,
    trainer_of,
)
from vectorised_cases import CASES, SEED, SIZES, Case, mlp

from fedraclora.protocol.method import Cohort, Draw

# Every method on a model of each way to train, and what clients train on every model; the rest is
# for the long suite.
SHORT = {*product(KINDS, ("mlp", "cnn-adapted"))} | {*product(("fed_rac_lora", "fedavg"), CASES)}


@pytest.mark.short(when=lambda name, case: (name, case) in SHORT)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KINDS)
def test_every_method_on_every_model(name: str, case: str) -> None:
    run(CASES[case](), method_of(name), LOCAL, rounds=3, check={1, 3}, name=case)


@pytest.mark.parametrize("side", ["left", "auto"])
@pytest.mark.parametrize("model", ["mlp", "cnn-adapted", "bert-query-value"])
def test_a_sketch_on_either_side(model: str, side: str) -> None:
    method = method_of("fed_rac_lora", side=side, resample_every=2, sketch="gaussian")
    run(CASES[model](), method, LOCAL, rounds=2, check={2})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sizes", [(1,), (9,), (1, 1, 1), (12, 1)])
def test_one_client_and_clients_of_one_sample(sizes: tuple[int, ...], name: str) -> None:
    case = Case(mlp(sizes=sizes))
    method, plan = method_of(name), case.plan()
    clients = torch.arange(len(sizes))
    state = method.init(base_of(case.task), plan, Draw(SEED))
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(sizes))), Draw(SEED))
    agreed(f"mlp of {sizes}", case, plan, LOCAL, state.base, sent, clients)


def test_results_come_in_the_order_that_was_asked() -> None:
    case = CASES["mlp"]()
    method, plan = method_of("fedavg_lora"), case.plan()
    state = method.init(base_of(case.task), plan, Draw(SEED))
    clients = torch.tensor([4, 0, 5, 2, 1, 3])
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(SIZES))), Draw(SEED))
    assert_agrees(case, plan, LOCAL, state.base, sent, clients)
    result = trainer_of(case.task, plan, LOCAL).train(
        state.base, sent, clients, round_=1, rate_scale=1.0
    )
    assert result.samples.tolist() == [SIZES[c] for c in clients.tolist()]
    assert result.steps.tolist() == [2 * -(-SIZES[c] // 4) for c in clients.tolist()]
