"""Starts of both factors: what they are, that they leave the weights, where they are refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from fedraclora.compatibility import Features
from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.devices.distributions import Constant
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, Draw, Plan, RoundInstructions, State
from fedraclora.protocol.plan import make_plan
from fedraclora.protocol.program import GRADIENT
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch import SketchSpec
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.methods.fedavg_lora import FedAvgLora
from fedraclora.strategies.shared.factors import Factored
from fedraclora.strategies.shared.initials import GAMMA, STARTS, gradient_factors, orthogonal
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.tree import Tree
from tests.reference.client import train_one

M, N, R, ALPHA = 8, 11, 3, 5.0
S = ALPHA / R
DRAW = Draw(3)
LIVING = (
    "fedavg_lora",
    "fedex_lora",
    "fedmomentum",
    "fedrot_lora",
    "flexlora",
    "fslora",
    "hetlora",
    "lora_fair",
)


def plan_of(kind: str = "linear") -> Plan:
    stored = (N, M) if kind == "conv1d" else (M, N)
    return Plan({"w": LayerView(kind, (M, N))}, shapes={"w": stored})


def weight(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch_normal(generator(0, "weight"), M, N).to(dtype)


def begin(initial: str, kind: str = "linear", dtype: torch.dtype = torch.float64) -> State:
    stored = weight(dtype).mT.contiguous() if kind == "conv1d" else weight(dtype)
    method = FedAvgLora(rank=R, alpha=ALPHA, init=initial)
    return method.initial_state({"w": stored}, plan_of(kind), DRAW)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_pissa_moves_the_principal_part_from_the_weight_into_the_factors(kind: str) -> None:
    state = begin("pissa", kind)
    U, s, Vt = torch.linalg.svd(weight())
    B, A = state.carried["w/B"], state.carried["w/A"]
    torch.testing.assert_close(S * B @ A, U[:, :R] * s[:R] @ Vt[:R], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(B.mT @ B, torch.diag(s[:R] / S), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A @ A.mT, torch.diag(s[:R] / S), rtol=1e-12, atol=1e-12)
    rest = plan_of(kind).targets["w"].matrix(state.base["w"])
    torch.testing.assert_close(rest, U[:, R:M] * s[R:] @ Vt[R:M], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("initial", STARTS)
@pytest.mark.parametrize("name", LIVING)
def test_a_start_leaves_the_effective_weights(
    name: str, initial: str, dtype: torch.dtype, most: float
) -> None:
    method = METHODS[name](rank=R, alpha=ALPHA, init=initial)  # type: ignore[call-arg]
    state = method.initial_state({"w": weight(dtype)}, plan_of(), DRAW)
    found = method.weights(state, DRAW)["w"]
    torch.testing.assert_close(found, weight(dtype), rtol=0, atol=most)


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_orthogonal_factors_are_drawn_and_their_product_is_zero(rank: int) -> None:
    B, A = orthogonal((M, N), rank, seed=5)
    assert float((B @ A).abs().max()) < 1e-15
    ranks = [int(torch.linalg.matrix_rank(t)) for t in (B, A)]
    assert ranks == [rank // 2, rank - rank // 2]
    # X_1 = Q_1 A_0 and X_2 = B_0 Q_2^T have entries of deviation 0.1.
    wide_B, wide_A = orthogonal((4000, 3000), rank, seed=5)
    wanted_A, wanted_B = 0.01 * 3000 * (rank - rank // 2), 0.01 * 4000 * (rank // 2)
    assert float(wide_A.square().sum()) == pytest.approx(wanted_A, rel=0.1)
    assert float(wide_B.square().sum()) == pytest.approx(wanted_B, rel=0.1)


def test_orthogonal_leaves_the_base_and_draws_each_layer_by_itself() -> None:
    state = begin("orthogonal")
    assert torch.equal(state.base["w"], weight())
    other, again = orthogonal((M, N), R, DRAW.sketch_seed("v")), begin("orthogonal")
    assert torch.equal(state.carried["w/B"], again.carried["w/B"])
    assert not torch.equal(state.carried["w/B"], other[0])


# --- gradients -----------------------------------------------------------------------------------


def test_gradient_factors_are_singular_vectors_of_the_gradient() -> None:
    G = torch_normal(generator(1, "gradient"), M, N)
    Q = torch.linalg.qr(torch_normal(generator(2, "basis"), M, M))[0]
    B, A = gradient_factors(Q, Q.mT @ G, R)
    U, _, Vt = torch.linalg.svd(G)
    c = M**0.25 / GAMMA**0.5
    for found, wanted in ((A / c, Vt[:R]), (B.mT / c, U[:, R : 2 * R].mT)):
        assert found.shape == wanted.shape
        overlap = (found @ wanted.mT).abs()
        torch.testing.assert_close(overlap, torch.eye(R).double(), rtol=0, atol=1e-12)


SIZES = (4, 9, 1, 6)


def make_task() -> Task:
    """y = f(x): a layer 11 -> 8, tanh, 8 -> 3, in float64, with ragged clients."""
    rng = generator(5, "samples")
    model = torch.nn.Sequential(torch.nn.Linear(N, M), torch.nn.Tanh(), torch.nn.Linear(M, 3))
    model = model.double()
    for parameter in model.parameters():
        parameter.data.copy_(torch_normal(rng, *parameter.shape) / N**0.5)
    samples = Samples({"x": torch_normal(rng, sum(SIZES), N)}, torch_normal(rng, sum(SIZES), 3))
    cuts = torch.tensor([0, *SIZES]).cumsum(0).tolist()
    parts = [torch.arange(a, b).numpy() for a, b in pairwise(cuts)]
    return Task(
        model, ("2",), "squared_error", ("loss",), PartitionedData.of(samples, parts), samples
    )


def task_plan(task: Task) -> tuple[Plan, Tree]:
    plan = make_plan(task.model, task.head, head_policy="full", bias_policy="full")
    return plan, {n: p.detach().clone() for n, p in task.model.named_parameters()}


def true_gradient(task: Task, base: Tree, rows: torch.Tensor) -> torch.Tensor:
    """Of the mean loss over some samples, by autograd, for the first weight."""
    values = {n: t.clone().requires_grad_() for n, t in base.items()}
    output = torch.func.functional_call(task.model, values, (task.test.inputs["x"][rows],))
    loss = 0.5 * (output - task.test.target[rows]).square().sum(dim=1).mean()
    return torch.autograd.grad(loss, values["0.weight"])[0]


def probing(rank: int) -> RoundInstructions:
    spec = SketchSpec("orthonormal", "right", rank, N, seed=4, index=0)
    factors = {"B": to_train((M, rank)), "A": spec}
    return RoundInstructions({"0.weight": Adapter.of(factors, S)}, program=GRADIENT)


LOCALS: dict[str, dict[str, Any]] = {
    "sgd": {"batch_size": 4, "epochs": 2, "momentum": 0.5},
    "adamw": {"optimizer": "adamw", "batch_size": 2, "steps": 5, "weight_decay": 0.1},
}


@pytest.mark.parametrize("local", LOCALS.values(), ids=list(LOCALS))
def test_a_probe_is_that_of_the_one_client_loop(local: dict[str, Any]) -> None:
    task, settings = make_task(), LocalSettings(lr=0.3, **local)
    plan, base = task_plan(task)
    trainer = CohortTrainer(task, plan, settings, seed=1, device=torch.device("cpu"))
    clients = torch.arange(len(SIZES))
    found = trainer.train(base, probing(5), clients, round_=1, rate_scale=1.0)
    for k in clients.tolist():
        trained, loss = train_one(
            task, plan, settings, base, probing(5), client=k, place=k, round_=1, seed=1
        )
        wanted = trained["0.weight/B"]
        torch.testing.assert_close(found.trained["0.weight/B"][k], wanted, rtol=1e-10, atol=1e-12)
        assert float(found.losses[k]) == pytest.approx(loss, rel=1e-10)


def test_a_probe_is_the_gradient_where_clients_start() -> None:
    """Several steps with a large step size, and still the gradient of the first point."""
    task = make_task()
    plan, base = task_plan(task)
    settings = LocalSettings(lr=10.0, steps=4, batch_size=0)
    trainer = CohortTrainer(task, plan, settings, seed=1, device=torch.device("cpu"))
    trial = trainer.train(base, probing(N), torch.arange(4), round_=1, rate_scale=1.0)
    A, start = probing(N).adapters["0.weight"].factors["A"], 0
    assert A.drawing is not None
    for k, size in enumerate(SIZES):
        wanted = true_gradient(task, base, torch.arange(start, start + size))
        found = trial.trained["0.weight/B"][k] @ A.draw() / S
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        start += size


# --- where they do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("initial", STARTS)
def test_starts_are_refused_where_factors_do_not_live_on(initial: str) -> None:
    for make in (
        lambda: FedAvgLora(init=initial, merge_every=4),
        lambda: METHODS["flora_stacking"](init=initial),
        lambda: METHODS["fed_sb"](init=initial),
    ):
        with pytest.raises(ConfigError, match=rf"method\.init={initial}.*`both`"):
            make()


def test_an_unknown_start_names_those_that_fit() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'pissa'\?.*orthogonal"):
        FedAvgLora(init="pisa")
    with pytest.raises(ConfigError) as refused:
        METHODS["fed_sb"](init="pisa")
    assert "pissa" not in str(refused.value).partition("There are")[2]


def test_rank_budgets_are_refused_beside_a_start() -> None:
    budgets = SystemConfig(rank_budget=Constant(0.5))
    assert not [*Features([budgets, METHODS["flexlora"]()]).conflicts()]
    for initial in STARTS:
        assert [*Features([budgets, METHODS["flexlora"](init=initial)]).conflicts()]


def test_lora_ga_needs_twice_as_many_vectors_as_its_rank() -> None:
    method = METHODS["fedex_lora"](rank=6, alpha=ALPHA, init="lora_ga")
    state = method.initial_state({"w": weight()}, plan_of(), DRAW)
    assert state.notes == ("rank of w capped at 4: lora_ga needs twice as many vectors",)
    assert method.ranks_and_scales(plan_of()) == ({"w": 4}, {"w": ALPHA / 4})
    with pytest.raises(ConfigError, match=r"2 r singular vectors.*only 8"):
        replace(method, cap=False).initial_state({"w": weight()}, plan_of(), DRAW)
    thin = Plan({"w": LayerView("linear", (1, N))}, shapes={"w": (1, N)})
    with pytest.raises(ConfigError, match="leave the layer out"):
        replace(method, rank=1).initial_state({"w": weight()[:1]}, thin, DRAW)


def test_a_start_is_bounded_by_the_smaller_side() -> None:
    """A drawing of a right sketch is bounded by n alone; singular vectors are by both."""
    assert FedAvgLora(rank=10).rank_of(plan_of(), "w") == 10
    assert FedAvgLora(rank=10, init="pissa").rank_of(plan_of(), "w") == M


def test_every_method_that_trains_both_factors_takes_a_start_or_refuses_it() -> None:
    both = {name for name, kind in METHODS.items() if issubclass(kind, Factored)}
    assert set(LIVING) <= both
    named = {name for name in both if METHODS[name] is FedAvgLora}
    for name in sorted(both - set(LIVING) - named):
        with pytest.raises(ConfigError, match=r"method\.init=pissa"):
            METHODS[name](init="pissa")  # type: ignore[call-arg]
