"""What single methods say of themselves, against dense algebra; contract holds what all share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedraclora.errors import ConfigError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.method import Cohort, Draw, Method, Plan, RoundInstructions, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.methods.bernoulli_lora import BernoulliLora
from fedraclora.strategies.methods.fed_sb import FedSb
from fedraclora.strategies.methods.fedex_lora import FedExLora
from fedraclora.strategies.methods.fedkrso import FedKrso
from fedraclora.strategies.methods.fedmomentum import FedMomentum
from fedraclora.strategies.methods.fedrot_lora import FedRotLora, rotations
from fedraclora.strategies.methods.fedsvd import FedSvd
from fedraclora.strategies.methods.flexlora import FlexLora
from fedraclora.strategies.methods.flora_stacking import FloraStacking
from fedraclora.strategies.methods.frlora import FrLora
from fedraclora.strategies.methods.hetlora import HetLora
from fedraclora.strategies.methods.lora_fair import LoraFair
from fedraclora.strategies.methods.ravan import Ravan
from fedraclora.strategies.methods.rolora import RoLora
from fedraclora.strategies.methods.slora import SLora

M, N, R, ALPHA, K = 8, 11, 3, 5.0, 4
S = ALPHA / R
P = torch.tensor([1.0, 2.5, 4.0, 0.5], dtype=torch.float64) / 8
COHORT = Cohort(torch.arange(K), P * 8)
DRAW = Draw(3)
PLAN = Plan({"w": LayerView("linear", (M, N))}, shapes={"w": (M, N)})
W = torch_normal(generator(0, "weight"), M, N)


class RoundContext:
    """One round of a method with random replies: dense terms by name."""

    def __init__(
        self, method: Method, state: State | None = None, number: int = 1, cohort: Cohort = COHORT
    ) -> None:
        self.method = method
        self.before = state or method.initial_state({"w": W}, PLAN, DRAW)
        self.sent: RoundInstructions = method.open_round(self.before, number, cohort, DRAW)
        layout = self.sent.layout
        rows = torch_normal(generator(number, "replies"), K, layout.size)
        self.got = Uplinks(cohort.clients, cohort.weights, layout, rows)
        self.after = method.close_round(self.before, self.sent, self.got)

    def next(self, number: int) -> RoundContext:
        """The round after this one."""
        return RoundContext(self.method, self.after, number)

    @property
    def mean_product(self) -> torch.Tensor:
        """sum_k p_k B_k A_k."""
        stack = self.got.stack()
        return torch.stack([P[k] * stack["w/B"][k] @ stack["w/A"][k] for k in range(K)]).sum(0)

    @property
    def carried(self) -> torch.Tensor:
        """B A, as the next round starts."""
        return self.after.carried["w/B"] @ self.after.carried["w/A"]

    @property
    def moved(self) -> torch.Tensor:
        """What was merged, over the scale."""
        return (self.after.base["w"] - self.before.base["w"]) / S


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix of a rank, by a dense SVD."""
    U, s, Vt = torch.linalg.svd(matrix)
    return U[:, :rank] * s[:rank] @ Vt[:rank]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_flexlora_carries_the_nearest_product_of_its_rank() -> None:
    played = RoundContext(FlexLora(R, ALPHA))
    close(played.carried, best(played.mean_product, R))
    B, A = played.after.carried["w/B"], played.after.carried["w/A"]
    close(B.mT @ B, A @ A.mT)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_cut_residual_of_fedex_is_the_nearest_of_its_rank(rank: int) -> None:
    played = RoundContext(FedExLora(R, ALPHA, residual_rank=rank))
    close(played.moved, best(played.mean_product - played.carried, rank))


def test_the_residual_of_fedex_has_no_more_than_its_rank() -> None:
    played = RoundContext(FedExLora(1, ALPHA))
    assert played.after.link is not None
    left, _ = played.after.link.terms["w"].factors
    assert left.shape == (M, K - 1)


def test_fedmomentum_carries_the_leading_part_and_merges_the_rest() -> None:
    played = RoundContext(FedMomentum(R, ALPHA))
    close(played.carried, best(played.mean_product, R))
    close(played.moved, played.mean_product - best(played.mean_product, R))


@pytest.mark.parametrize("ridge", [1e-9, 0.01, 10.0])
def test_lora_fair_finds_the_least_of_its_objective(ridge: float) -> None:
    played = RoundContext(LoraFair(R, ALPHA, ridge=ridge))
    mean = played.got.mean()
    A = played.after.carried["w/A"]
    D = (played.after.carried["w/B"] - mean["w/B"]).clone().requires_grad_()
    gap = played.mean_product - (mean["w/B"] + D) @ A
    (gap.square().sum() + ridge * D.square().sum()).backward()
    assert D.grad is not None
    assert float(D.grad.abs().max()) < 1e-9
    assert float(D.detach().abs().max()) > 1e-3


def nearest_rotation(matrix: torch.Tensor) -> torch.Tensor:
    """The rotation with the least squared distance to a matrix."""
    U, _, Vt = np.linalg.svd(matrix.numpy())
    turn = np.diag([1.0] * (len(U) - 1) + [np.linalg.det(U) * np.linalg.det(Vt)])
    return torch.from_numpy(U @ turn @ Vt)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_fedrot_turns_factors_towards_the_last_ones_in_turn(strength: float) -> None:
    first = RoundContext(FedRotLora(R, ALPHA, strength=strength))
    mean = first.got.mean()
    for label in ("w/B", "w/A"):
        close(first.after.carried[label], mean[label])
    second = first.next(2)
    for played, aligned in ((second, "A"), (second.next(3), "B")):
        B0, A0 = played.before.carried["w/B"], played.before.carried["w/A"]
        stack, B, A = played.got.stack(), torch.zeros(M, R), torch.zeros(R, N)
        for k in range(K):
            Bk, Ak = stack["w/B"][k], stack["w/A"][k]
            whole = nearest_rotation(Ak @ A0.mT if aligned == "A" else Bk.mT @ B0)
            turn = nearest_rotation((1 - strength) * torch.eye(R).double() + strength * whole)
            B, A = B + P[k] * Bk @ turn, A + P[k] * turn.mT @ Ak
        close(played.after.carried["w/B"], B)
        close(played.after.carried["w/A"], A)


def test_fedrot_undoes_a_rotation_of_the_factors() -> None:
    """Clients that send one product in coordinates of their own lose nothing in the mean."""
    rng, method = generator(5, "turned"), FedRotLora(R, ALPHA)
    before = RoundContext(method).next(2).after
    sent = method.open_round(before, 3, COHORT, DRAW)
    turns = rotations(torch_normal(rng, K, R, R))
    B, A = before.carried["w/B"], before.carried["w/A"]
    layout = sent.layout
    rows = layout.pack({"w/B": B @ turns, "w/A": turns.mT @ A}, lead=1)
    after = method.close_round(before, sent, Uplinks(COHORT.clients, COHORT.weights, layout, rows))
    close(after.carried["w/B"], B)
    close(after.carried["w/A"], A)
    close(turns.mT @ turns, torch.eye(R).double().expand(K, R, R))
    close(torch.linalg.det(turns), torch.ones(K).double())


def test_hetlora_weighs_by_the_norms_of_products_and_cuts_by_budgets() -> None:
    ranks = torch.tensor([1, 3, 2, 3])
    first = RoundContext(HetLora(R, ALPHA))
    played = RoundContext(first.method, first.after, 2, replace(COHORT, ranks=ranks))
    starts = played.sent.trained()
    for label, axis in (("w/B", 1), ("w/A", 0)):
        start = starts[label].numbers
        assert start is not None
        for k, rank in enumerate(ranks.tolist()):
            inside, beyond = start[k].split([rank, R - rank], dim=axis)
            assert torch.equal(inside, first.after.carried[label].split([rank, R - rank], axis)[0])
            assert torch.count_nonzero(beyond) == 0
    stack = played.got.stack()
    B, A = stack["w/B"].clone(), stack["w/A"].clone()
    for k, rank in enumerate(ranks.tolist()):
        B[k, :, rank:], A[k, rank:] = 0, 0
    norms = torch.linalg.matrix_norm(B @ A)
    w = P * norms / (P * norms).sum()
    close(played.after.carried["w/B"], (w[:, None, None] * B).sum(0))
    close(played.after.carried["w/A"], (w[:, None, None] * A).sum(0))


def test_flora_draws_anew_and_stacks_what_budgets_leave() -> None:
    played = RoundContext(FloraStacking(R, ALPHA))
    starts = [r.sent.trained()["w/A"].sketch for r in (played, played.next(2))]
    assert starts[0] != starts[1]
    assert played.sent.trained()["w/B"].blank
    close(played.moved, played.mean_product)
    some = RoundContext(
        FloraStacking(R, ALPHA), cohort=replace(COHORT, ranks=torch.tensor([1, 3, 2, 3]))
    )
    assert some.after.link is not None
    factor = some.after.link.terms["w"].factors[0]
    assert factor.numbers is not None
    assert factor.shape == (M, 9)


def test_frlora_restarts_from_the_principal_part() -> None:
    played = RoundContext(FrLora(R, ALPHA))
    B0, A0 = played.before.carried["w/B"], played.before.carried["w/A"]
    close(S * B0 @ A0, best(W, R))
    close(played.before.base["w"], W - best(W, R))
    mean = played.got.mean()
    close(played.moved, mean["w/B"] @ mean["w/A"] - B0 @ A0)
    again = played.next(2).sent.trained()
    assert torch.equal(again["w/B"].opening(), B0)  # type: ignore[arg-type]
    assert torch.equal(again["w/A"].opening(), A0)  # type: ignore[arg-type]


def test_fedsvd_keeps_the_product_and_the_row_space() -> None:
    first = RoundContext(FedSvd(R, ALPHA))
    A = first.sent.adapters["w"].factors["A"]
    assert A.drawing is not None
    drawn = A.draw()
    second = first.next(2)
    for played in (first, second):
        B, A_new = played.after.carried["w/B"], played.after.carried["w/A"]
        close(A_new @ A_new.mT, torch.eye(R).double())
        gram = B.mT @ B
        close(gram, torch.diag(gram.diagonal()))
        close(A_new @ drawn.mT @ drawn, A_new)
    frozen = second.sent.adapters["w"].factors["A"]
    assert frozen.numbers is not None
    close(second.carried, second.got.mean()["w/B"] @ frozen.numbers)


def test_rolora_trains_the_factors_in_turn() -> None:
    played = RoundContext(RoLora(R, ALPHA))
    for number, label in ((1, "B"), (2, "A"), (3, "B"), (4, "A")):
        assert list(played.sent.trained()) == [f"w/{label}"]
        kept = {n: t for n, t in played.before.carried.items() if n != f"w/{label}"}
        assert all(torch.equal(played.after.carried[n], t) for n, t in kept.items())
        played = played.next(number + 1)


def test_bernoulli_draws_the_side_that_the_coin_says() -> None:
    method = BernoulliLora(R, ALPHA, probability=0.4)
    played, trained = RoundContext(method), []
    for number in range(2, 42):
        trained += list(played.sent.trained())
        played = played.next(number)
    assert 8 <= trained.count("w/A") <= 24
    assert trained.count("w/A") + trained.count("w/B") == 40
    sides = {
        p: list(RoundContext(replace(method, probability=p)).sent.trained()) for p in (0.0, 1.0)
    }
    assert sides == {0.0: ["w/B"], 1.0: ["w/A"]}


@pytest.mark.parametrize("method", [FedSb(R, ALPHA), Ravan(2, ALPHA, heads=3)])
def test_cores_stand_between_orthonormal_factors(method: FedSb) -> None:
    factors = RoundContext(method).sent.adapters["w"].factors
    B, A = (factors[label].draw() for label in ("B", "A"))
    core = factors["R"]
    assert core.trained
    eye = torch.eye(core.shape[0]).double()
    close(B.mT @ B, eye)
    close(A @ A.mT, eye)


def test_the_two_factors_about_a_core_are_independent() -> None:
    """A square weight has equal shapes on both sides: they must not be one drawing."""
    plan = Plan({"w": LayerView("linear", (M, M))}, shapes={"w": (M, M)})
    method = FedSb(R, ALPHA)
    sent = method.open_round(method.initial_state({"w": W[:, :M]}, plan, DRAW), 1, COHORT, DRAW)
    B, A = (sent.adapters["w"].factors[label].draw() for label in ("B", "A"))
    assert float((B - A.mT).abs().max()) > 0.1


def test_the_subspaces_of_fedkrso_are_those_of_the_run() -> None:
    played = RoundContext(FedKrso(R, ALPHA, sketches=2))
    A = [r.sent.adapters["w"].factors["A"] for r in (played, played.next(2))]
    assert A[0] == A[1]
    assert A[0].drawing is not None
    assert A[0].draw().shape == (2 * R, N)
    one = RoundContext(FedKrso(R, ALPHA, sketches=2, normalize="identity")).sent.adapters["w"]
    grams = []
    for seed in range(400):
        spec = replace(one.factors["A"].drawing, seed=seed)  # type: ignore[type-var]
        part = spec.draw()[:R] * one.scale / S
        grams.append(part.mT @ part)
    mean = torch.stack(grams).mean(0)
    assert float((mean - torch.eye(N).double()).abs().max()) < 0.5
    assert float(mean.diagonal().mean()) == pytest.approx(1.0, abs=0.05)


def test_slora_turns_its_change_into_factors_and_keeps_the_rest() -> None:
    plan = replace(PLAN, weights=("w",))
    method = SLora(R, ALPHA, sparse_rounds=2)
    state = method.initial_state({"w": W}, plan, DRAW)
    first = RoundContext(method, state)
    assert first.sent.program.name == "sparse"
    assert "w/B" not in first.after.carried
    second = first.next(2)
    new = second.got.mean()["w"]
    close(S * second.carried, best(new - W, R))
    close(second.after.base["w"], new - best(new - W, R))
    assert list(second.next(3).sent.trained()) == ["w/B", "w/A"]
    assert "w/initial" not in second.after.carried


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: FedExLora(residual_rank=0), "residual_rank"),
        (lambda: LoraFair(ridge=0.0), "ridge"),
        (lambda: Ravan(heads=0), "heads"),
        (lambda: SLora(sparse_rounds=0), "sparse_rounds"),
        (lambda: SLora(density=0.0), "density"),
        (lambda: FedKrso(interval=0), "interval"),
        (lambda: BernoulliLora(probability=1.5), "probability"),
        (lambda: RoundContext(Ravan(1, ALPHA, heads=9)), "heads"),
    ],
)
def test_impossible_hyperparameters_are_refused(make: Callable[[], object], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{key}\b"):
        make()
