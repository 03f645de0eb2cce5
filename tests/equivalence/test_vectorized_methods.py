"""A batch of clients comes to what each comes to alone: every method, and any cohort."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from vectorized_agreement import (
    ATOL,
    KINDS,
    LOCAL,
    agreed,
    assert_agrees,
    base_of,
    method_of,
    run,
    trainer_of,
)
from vectorized_cases import CASES, SEED, SIZES, Case, mlp, scaled
from vectorized_settings import ALSO, WIDELY

from fedraclora.protocol.link import Terms
from fedraclora.protocol.method import Cohort, Draw
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator, torch_normal
from fedraclora.tree import Tree, parameters

# Every method on one model, factors of every form on one that is trained in the other way, and what
# clients train on every kind of model: B on each, whole weights where others are whole besides; the
# rest is for the long suite.
SHORT = {*product(KINDS, ("mlp",)), *product(WIDELY | ALSO, ("cnn-adapted",))}
SHORT |= {*product(("fed_rac_lora",), CASES)}
SHORT |= {("fedavg", "bert-all-linear-norms"), ("fedavg", "gpt")}


@pytest.mark.short(when=lambda name, case: (name, case) in SHORT)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KINDS)
def test_every_method_on_every_model(name: str, case: str) -> None:
    run(CASES[case](), method_of(name), LOCAL, rounds=3, check={1, 3}, name=case)


@pytest.mark.parametrize("train", ["A", "auto"])
@pytest.mark.parametrize("model", ["mlp", "cnn-adapted", "bert-query-value"])
def test_a_sketch_on_either_side(model: str, train: str) -> None:
    method = method_of("fed_rac_lora", train=train, merge_every=2, sketch="gaussian")
    run(CASES[model](), method, LOCAL, rounds=2, check={2})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sizes", [(1,), (9,), (1, 1, 1), (12, 1)])
def test_one_client_and_clients_of_one_sample(sizes: tuple[int, ...], name: str) -> None:
    case = Case(mlp(sizes=sizes))
    method, plan = method_of(name), case.plan()
    clients = torch.arange(len(sizes))
    state = method.initial_state(base_of(case.task), plan, Draw(SEED))
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(sizes))), Draw(SEED))
    agreed(f"mlp of {sizes}", case, plan, LOCAL, state.base, sent, clients)


def test_results_come_in_the_order_that_was_asked() -> None:
    case = CASES["mlp"]()
    method, plan = method_of("fedavg_lora"), case.plan()
    state = method.initial_state(base_of(case.task), plan, Draw(SEED))
    clients = torch.tensor([4, 0, 5, 2, 1, 3])
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(SIZES))), Draw(SEED))
    assert_agrees(case, plan, LOCAL, state.base, sent, clients)
    result = trainer_of(case.task, plan, LOCAL).train(
        state.base, sent, clients, round_=1, rate_scale=1.0
    )
    assert result.samples.tolist() == [SIZES[c] for c in clients.tolist()]
    assert result.steps.tolist() == [2 * -(-SIZES[c] // 4) for c in clients.tolist()]


@pytest.mark.parametrize("case", ["mlp", "cnn-adapted", "gpt2", "vmap"])
def test_a_pool_may_stand_beside_weights_that_it_is_not_folded_into(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is for narrow weights; in float64 both ways come to the same."""
    world = Case(scaled(), dense="gain,shift") if case == "vmap" else CASES[case]()
    method, plan, draw = method_of("pool_rac_lora", pool=2), world.plan(), Draw(SEED)
    cohort = Cohort(torch.arange(len(SIZES)), torch.arange(1.0, len(SIZES) + 1).double())
    state = method.initial_state(base_of(world.task), plan, draw)
    for round_ in range(1, 4):
        sent = method.open_round(state, round_, cohort, draw)
        layout = sent.layout
        rows = torch_normal(generator(SEED, round_), len(SIZES), layout.size)
        got = Uplinks(cohort.clients, cohort.weights, layout, rows)
        state = method.close_round(state, sent, got)
    sent = method.open_round(state, 4, cohort, draw)
    program: Any = sent.program
    assert program.pools.keys() == sent.adapters.keys()

    def trained() -> Tree:
        trainer = trainer_of(world.task, plan, LOCAL)
        return trainer.train(state.base, sent, cohort.clients, round_=4, rate_scale=1.0).trained

    folded = trained()

    def apart(self: Any, base: Tree, *_: object) -> tuple[Tree, Terms]:
        return parameters(base), {name: pool.term(name, base) for name, pool in self.pools.items()}

    monkeypatch.setattr(type(program), "fold", apart)
    for name, value in trained().items():
        torch.testing.assert_close(value, folded[name], rtol=0, atol=ATOL)
