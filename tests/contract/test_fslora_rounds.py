"""FSLoRA: what each client is sent, what the server makes of it, and the step of a client."""

from __future__ import annotations

import pytest
import torch

from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.method import Cohort, Draw, Plan, State
from fedraclora.protocol.program import GradientStage
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.methods.fslora import FsLora, SketchedTraining

M, N, RANK, SEED = 7, 9, 5, 3
METHOD = FsLora(rank=RANK, alpha=8.0, share=0.4)
COHORT = Cohort(torch.tensor([2, 5, 6]), torch.tensor([1.0, 2.0, 3.0]).double())
DRAW = Draw(SEED)


def begun() -> State:
    """A state whose factors are both drawn."""
    plan = Plan({"w": LayerView("linear", (M, N))}, shapes={"w": (M, N)})
    state = METHOD.initial_state({"w": torch.zeros(M, N).double()}, plan, DRAW)
    state.carried["w/B"] = torch_normal(generator(0, "B"), M, RANK)
    return state


@pytest.mark.slow
def test_the_mean_of_a_clients_product_is_that_of_the_server() -> None:
    state = begun()
    B, A = state.carried["w/B"], state.carried["w/A"]
    rounds = range(1, 3001)
    total = torch.zeros(M, N).double()
    for round_ in rounds:
        factors = METHOD.open_round(state, round_, COHORT, DRAW).adapters["w"].factors
        own_B, own_A = (factors[k].draw() for k in ("B", "A"))
        assert own_B.shape == (3, M, 2)
        total += (own_B @ own_A).mean(dim=0) / len(rounds)
    assert float((total - B @ A).norm() / (B @ A).norm()) < 0.03


def test_the_server_moves_what_clients_trained_by_their_weights_and_leaves_the_rest() -> None:
    state = begun()
    sent = METHOD.open_round(state, 4, COHORT, DRAW)
    factors, layer = sent.adapters["w"].factors, next(METHOD.layers_of(state))
    at = METHOD.chosen(layer, 4, COHORT.clients)
    assert len({tuple(row) for row in at.tolist()}) > 1
    c = RANK / at.shape[1]
    moves = {k: torch_normal(generator(k, "moves"), 3, *factors[k].shape) for k in ("B", "A")}
    rows = torch.stack(
        [
            sent.layout.pack({f"w/{k}": factors[k].draw()[i] + moves[k][i] for k in ("B", "A")})
            for i in range(3)
        ]
    )
    after = METHOD.close_round(
        state, sent, Uplinks(COHORT.clients, COHORT.weights, sent.layout, rows)
    )
    p = COHORT.weights / COHORT.weights.sum()
    B, A = state.carried["w/B"].clone(), state.carried["w/A"].clone()
    for i in range(3):
        for place, component in enumerate(at[i].tolist()):
            B[:, component] += p[i] * moves["B"][i][:, place] / c
            A[component] += p[i] * moves["A"][i][place]
    assert torch.allclose(after.carried["w/B"], B, rtol=1e-12)
    assert torch.allclose(after.carried["w/A"], A, rtol=1e-12)


def test_a_step_of_sgd_is_one_along_the_gradients_of_b_and_a() -> None:
    state = begun()
    sent = METHOD.open_round(state, 1, COHORT, DRAW)
    assert isinstance(sent.program, SketchedTraining)
    c = RANK / 2
    hook = sent.program.hooks(None)[GradientStage.PROGRAM]  # type: ignore[arg-type]
    given = {"w/B": torch.ones(1, M, 2), "w/A": torch.ones(1, 2, N), "bias": torch.ones(1, M)}
    found = hook(given, {})
    # Of c B: a step of it is c times one of B, whose gradient has a factor c of its own.
    assert found["w/B"].unique().tolist() == pytest.approx([c * c])
    assert found["w/A"].unique().tolist() == [1.0]
    assert found["bias"].unique().tolist() == [1.0]


def test_with_all_components_it_is_fedavg_lora() -> None:
    whole = FsLora(rank=RANK, alpha=8.0, share=1.0)
    plan = Plan({"w": LayerView("linear", (M, N))}, shapes={"w": (M, N)})
    state = whole.initial_state({"w": torch.zeros(M, N).double()}, plan, DRAW)
    factors = whole.open_round(state, 1, COHORT, DRAW).adapters["w"].factors
    for label in ("B", "A"):
        assert torch.equal(factors[label].draw()[1], state.carried[f"w/{label}"])
