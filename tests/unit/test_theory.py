"""`experiments.theory.bounds`: each descent inequality, by exact expectation on quadratics.

The expectations are enumerated, not sampled: over all coordinate sketches, all permutations of
the clients' batches and all cohorts. So a constant that is too small in some direction shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, permutations, product

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedraclora.errors import ConfigError
from fedraclora.experiments.theory.bounds import (
    Given,
    cover,
    federated,
    gd,
    gd_link,
    local_step_limit,
    logistic_pl,
    noisy_link,
    reshuffling,
    sampling,
    sgd,
)
from fedraclora.experiments.theory.cases import beside_kept, of_downlink, over_layers
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, RoundInstructions
from fedraclora.sketch import SKETCHES, Constants, SketchSpec, constants

Array = npt.NDArray[np.float64]
D = 3  # weights, a vector
RANK = 1


class Quadratics:
    """``f_{m,i}(w) = 1/2 (w - c)^T Q (w - c)`` for M clients with N batches each."""

    def __init__(self, seed: int, clients: int, batches: int, *, apart: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        roots = rng.standard_normal((clients, batches, D, D))
        self.Q = roots @ roots.swapaxes(-1, -2) / D
        # Clients apart in their minima, so that zeta^2 is large; and batches, so that sigma^2 is.
        own = apart * rng.standard_normal((clients, 1, D))
        self.c = own + rng.standard_normal((clients, batches, D))
        self.mean_Q = self.Q.mean(axis=(0, 1))
        pull = np.einsum("mnij,mnj->i", self.Q, self.c) / (clients * batches)
        self.optimum = np.linalg.solve(self.mean_Q, pull)

    def loss(self, w: Array) -> float:
        gap = w - self.c
        return float(
            0.5 * np.einsum("mni,mnij,mnj->", gap, self.Q, gap) / len(self.c.reshape(-1, D))
        )

    def gradients(self, w: Array) -> Array:
        """Of every batch, [M, N, D]."""
        return np.einsum("mnij,mnj->mni", self.Q, w - self.c)

    def given(self, w: Array, **changed: object) -> Given:
        """Everything the theorems are told, sigma^2 and zeta^2 at ``w``."""
        all_, own = self.gradients(w), self.gradients(w).mean(axis=1)
        values = np.linalg.eigvalsh(self.mean_Q)
        known = Given(
            smoothness=float(np.linalg.eigvalsh(self.Q).max()),
            gap=self.loss(w) - self.loss(self.optimum),
            pl=float(values[0]),
            sigma_sq=float(((all_ - own[:, None]) ** 2).sum(-1).mean()),
            zeta_sq=float(((own - own.mean(axis=0)) ** 2).sum(-1).mean()),
            lambda_min=RANK / D,
            lambda_max=RANK / D,
            curvature=float(values[0]),
        )
        return replace(known, **changed)  # type: ignore[arg-type]

    def square(self, w: Array) -> float:
        return float((self.gradients(w).mean(axis=(0, 1)) ** 2).sum())


def sketches(rng: np.random.Generator) -> list[Array]:
    """The projections of a uniform row of one orthonormal basis: E[H] = I / D."""
    basis = np.linalg.qr(rng.standard_normal((D, D)))[0]
    return [np.outer(basis[:, i], basis[:, i]) for i in range(D)]


def local(
    problem: Quadratics, w: Array, client: int, order: tuple[int, ...], H: Array, step: float
) -> Array:
    """The change of a client's epoch."""
    moved = w
    for i in order:
        moved = moved - step * H @ (problem.Q[client, i] @ (moved - problem.c[client, i]))
    return moved - w


def mean_loss_after(
    problem: Quadratics,
    w: Array,
    step: float,
    cohort: int,
    Hs: list[Array],
    server_step: float = 1.0,
) -> float:
    """E f(W^{t+1}): over sketches, permutations of each client, cohorts."""
    clients, batches = problem.c.shape[:2]
    orders = list(permutations(range(batches)))
    losses = []
    for H in Hs:
        changes = [[local(problem, w, m, o, H, step) for o in orders] for m in range(clients)]
        for chosen in combinations(range(clients), cohort):
            for picked in product(range(len(orders)), repeat=cohort):
                change = np.mean(
                    [changes[m][p] for m, p in zip(chosen, picked, strict=True)], axis=0
                )
                losses.append(problem.loss(w + server_step * change))
    return float(np.mean(losses))


def points(problem: Quadratics, rng: np.random.Generator) -> list[Array]:
    """Far away, near, and at the optimum, where only the error term holds."""
    return [problem.optimum + far * rng.standard_normal(D) for far in (5.0, 1.0, 0.1, 0.0)]


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize(
    ("clients", "batches", "cohort"), [(3, 2, 3), (3, 2, 2), (4, 2, 1), (1, 4, 1), (3, 1, 2)]
)
def test_a_federated_round_descends_as_the_theorem_says(
    clients: int, batches: int, cohort: int, share: float
) -> None:
    for seed in range(4):
        problem, rng = Quadratics(seed, clients, batches, apart=2.0), np.random.default_rng(seed)
        limit = local_step_limit(
            problem.given(problem.optimum).smoothness, batches, clients, cohort
        )
        Hs = sketches(rng)
        for w in points(problem, rng):
            given = problem.given(w)
            descent = federated(given, share * limit, batches, clients, cohort)
            after = mean_loss_after(problem, w, share * limit, cohort, Hs)
            change = -descent.progress * problem.square(w) + descent.error
            assert after - problem.loss(w) <= change + 1e-12


@pytest.mark.parametrize("server_step", [0.5, 1.5, 4.0])
@pytest.mark.parametrize(("clients", "batches", "cohort"), [(3, 2, 3), (4, 2, 1), (3, 1, 2)])
def test_a_server_step_descends_as_the_theorem_says(
    clients: int, batches: int, cohort: int, server_step: float
) -> None:
    for seed in range(3):
        problem, rng = Quadratics(seed, clients, batches, apart=2.0), np.random.default_rng(seed)
        smoothness = problem.given(problem.optimum).smoothness
        step = local_step_limit(smoothness, batches, clients, cohort, server_step)
        Hs = sketches(rng)
        for w in points(problem, rng):
            descent = federated(problem.given(w), step, batches, clients, cohort, server_step)
            after = mean_loss_after(problem, w, step, cohort, Hs, server_step)
            change = -descent.progress * problem.square(w) + descent.error
            assert after - problem.loss(w) <= change + 1e-12


@pytest.mark.parametrize(("clients", "batches", "cohort"), [(4, 2, 4), (4, 1, 2), (3, 2, 2)])
def test_two_sketches_descend_as_one_of_twice_the_rank_with_half_the_cohort(
    clients: int, batches: int, cohort: int
) -> None:
    half = cohort // 2
    for seed in range(3):
        problem, rng = Quadratics(seed, clients, batches, apart=2.0), np.random.default_rng(seed)
        smoothness = problem.given(problem.optimum).smoothness
        step = local_step_limit(smoothness, batches, clients, half)
        Hs, orders = sketches(rng), list(permutations(range(batches)))
        for w in points(problem, rng):
            losses = []
            for parts in permutations(range(D), 2):
                changes = [
                    [[local(problem, w, m, o, Hs[j], step) for o in orders] for m in range(clients)]
                    for j in parts
                ]
                for dealt in permutations(range(clients), cohort):
                    for picked in product(range(len(orders)), repeat=cohort):
                        moves = [changes[i // half][m][picked[i]] for i, m in enumerate(dealt)]
                        losses.append(problem.loss(w + np.sum(moves, axis=0) / half))
            given = problem.given(w, lambda_min=2 / D, lambda_max=2 / D)
            descent = federated(given, step, batches, clients, half)
            change = -descent.progress * problem.square(w) + descent.error
            assert np.mean(losses) - problem.loss(w) <= change + 1e-12


def test_the_error_of_a_federated_round_is_needed() -> None:
    problem, rng = Quadratics(0, 4, 2, apart=2.0), np.random.default_rng(0)
    w = problem.optimum
    limit = local_step_limit(problem.given(w).smoothness, 2, 4, 1)
    rise = mean_loss_after(problem, w, limit, 1, sketches(rng)) - problem.loss(w)
    error = federated(problem.given(w), limit, 2, 4, 1).error
    assert 0.05 * error < rise < error


@pytest.mark.parametrize("length", [1.0, 0.6, 0.3])
def test_local_steps_beside_a_kept_direction_descend_as_the_theorem_says(length: float) -> None:
    clients, batches, cohort = 3, 2, 2
    for seed in range(3):
        problem, rng = Quadratics(seed, clients, batches, apart=2.0), np.random.default_rng(seed)
        step = local_step_limit(problem.given(problem.optimum).smoothness, batches, clients, cohort)
        kept, *others = sketches(rng)
        Ds = [length**2 * kept + fresh for fresh in others]
        known = vars(beside_kept(rank=2, kept=1, dim=D, length=length, local=True))
        for w in points(problem, rng):
            descent = federated(problem.given(w, **known), step, batches, clients, cohort)
            after = mean_loss_after(problem, w, step, cohort, Ds)
            change = -descent.progress * problem.square(w) + descent.error
            assert after - problem.loss(w) <= change + 1e-12


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("share", [1.0, 0.3, 0.05])
def test_a_link_of_gradient_descent_descends_as_the_theorem_says(share: float, rounds: int) -> None:
    for seed in range(4):
        problem, rng = Quadratics(seed, 1, 3), np.random.default_rng(seed)
        Hs, L = sketches(rng), float(np.linalg.eigvalsh(problem.mean_Q)[-1])
        for w in points(problem, rng):
            losses = []
            for H in Hs:
                moved = w
                for _ in range(rounds):
                    moved = moved - share / L * H @ problem.gradients(moved).mean(axis=(0, 1))
                losses.append(problem.loss(moved))
            descent = gd_link(problem.given(w, smoothness=L), share / L, rounds)
            change = -descent.progress * problem.square(w)
            assert np.mean(losses) - problem.loss(w) <= change + 1e-12


def test_a_link_on_the_isotropic_quadratic_is_exact() -> None:
    given = Given(smoothness=3.0, gap=5.0, pl=3.0, lambda_min=0.25, lambda_max=0.25)
    # Three rounds at a half of 1 / L leave (1/2)^6 of the loss inside the sketch.
    assert gd_link(given, 1 / 6, 3).contraction == pytest.approx(1 - 0.25 * (1 - 1 / 64))
    assert gd_link(given, 1 / 3, 7).progress == pytest.approx(gd(given, 1 / 3).progress)
    # Small steps: as many rounds under one sketch as under fresh ones.
    assert gd_link(given, 1e-6, 5).progress == pytest.approx(5e-6 * 0.25, rel=1e-3)


def test_a_link_of_sgd_descends_as_the_theorem_says() -> None:
    for seed in range(4):
        problem, rng = Quadratics(seed, 1, 5), np.random.default_rng(seed)
        Hs, L = sketches(rng), float(np.linalg.eigvalsh(problem.mean_Q)[-1])
        for w in points(problem, rng):
            first = [(H, w - H @ g / L) for H in Hs for g in problem.gradients(w)[0]]
            second = [v - H @ g / L for H, v in first for g in problem.gradients(v)[0]]
            sigma_sq = max(problem.given(v).sigma_sq for v in (w, *(v for _, v in first)))
            one = sgd(problem.given(w, smoothness=L, sigma_sq=sigma_sq), 1 / L)
            descent = noisy_link(one, 2)
            change = -descent.progress * problem.square(w) + descent.error
            assert np.mean([problem.loss(v) for v in second]) - problem.loss(w) <= change + 1e-12


def test_noise_that_depends_on_the_sketch_counts_in_full_after_the_first_round() -> None:
    """The later rounds of a link meet noise at a point that its sketch has led to."""
    given = Given(2.0, 1.0, sigma_sq=3.0, lambda_min=0.25, lambda_max=0.5)
    one = sgd(given, 0.5)
    whole = sgd(replace(given, lambda_max=1.0), 0.5)
    assert noisy_link(one, 3).error == pytest.approx(one.error + 2 * whole.error)
    assert noisy_link(one, 1) == replace(one, source="derived here, section 10")


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_step_of_sgd_descends_as_the_theorem_says(share: float) -> None:
    for seed in range(4):
        problem, rng = Quadratics(seed, 1, 5), np.random.default_rng(seed)
        Hs = sketches(rng)
        L = float(np.linalg.eigvalsh(problem.mean_Q)[-1])
        for w in points(problem, rng):
            descent = sgd(problem.given(w, smoothness=L), share / L)
            steps = [-share / L * H @ g for H in Hs for g in problem.gradients(w)[0]]
            after = np.mean([problem.loss(w + step) for step in steps])
            change = -descent.progress * problem.square(w) + descent.error
            assert after - problem.loss(w) <= change + 1e-12


def test_without_noise_sgd_is_gradient_descent() -> None:
    given = Given(2.0, 3.0, pl=0.5, lambda_min=0.25, lambda_max=0.5)
    assert (sgd(given, 0.4).progress, sgd(given, 0.4).error) == (gd(given, 0.4).progress, 0.0)


def test_gradient_descent_on_the_isotropic_quadratic_is_exact() -> None:
    given = Given(smoothness=3.0, gap=5.0, pl=3.0, lambda_min=0.25, lambda_max=0.25)
    descent = gd(given, 1 / 3)
    assert descent.contraction == pytest.approx(0.75)
    assert descent.loss_gap(4) == pytest.approx(5.0 * 0.75**4)
    # sum of 2 L gap_t over all t is 2 L Delta / 0.25: the mean over T rounds times T.
    assert descent.gradient(10) * 10 == pytest.approx(2 * 3.0 * 5.0 / 0.25)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("convex", [True, False])
def test_a_cover_descends_for_every_basis(convex: bool, share: float) -> None:
    rng = np.random.default_rng(3)
    blocks, rank = 3, 2
    d, worst = blocks * rank, 0.0
    for _ in range(300):
        values = np.sort(rng.uniform(0.05 if convex else -1.0, 1.0, d))
        values[-1] = 1.0
        turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
        Q = turn @ np.diag(values) @ turn.T
        basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
        w = rng.standard_normal(d)
        given = Given(1.0, 1.0, curvature=float(values[0]))
        descent = cover(given, share, blocks)
        moved = w
        for j in range(blocks):
            rows = basis[rank * j : rank * (j + 1)]
            moved = moved - share * rows.T @ (rows @ (Q @ moved))
        change = 0.5 * moved @ Q @ moved - 0.5 * w @ Q @ w
        assert change <= -descent.progress * ((Q @ w) ** 2).sum() + 1e-12
        worst = max(worst, -descent.progress * ((Q @ w) ** 2).sum() / change)
    assert worst > 0.3  # not far from tight


def test_a_cover_of_the_isotropic_quadratic_is_one_full_step() -> None:
    given = Given(smoothness=2.0, gap=1.0, pl=2.0, curvature=2.0)
    assert cover(given, 0.5, 7).contraction == pytest.approx(0.0)
    assert cover(given, 0.5, 7).loss_gap(1) == pytest.approx(0.0)
    assert cover(replace(given, curvature=None), 0.5, 7).contraction > 0.5


def test_one_block_is_gradient_descent() -> None:
    given = Given(smoothness=2.0, gap=1.0, pl=0.3, curvature=-1.0)
    assert cover(given, 0.5, 1).progress == gd(given, 0.5).progress


def test_all_clients_cost_no_sampling_error() -> None:
    given = Given(2.0, 1.0, zeta_sq=4.0, lambda_min=0.5, lambda_max=0.5)
    step = local_step_limit(2.0, 3)
    assert step == pytest.approx(1 / 12)
    assert sampling(7, 7) == 0
    assert sampling(7, 1) == 1
    assert sampling(7, 3) == pytest.approx(4 / 18)
    assert local_step_limit(2.0, 3, 7, 3) == pytest.approx(1 / 12 / (22 / 18) ** 0.5)
    # By hand: lambda_max Gamma L^2 gamma^2 / 2 * 2 N^2 zeta^2, Gamma = 1/4.
    assert federated(given, step, 3, 7, 7).error == pytest.approx(0.5 / 4 * (2 / 12) ** 2 * 9 * 4.0)
    more = (
        federated(given, step / 2, 3, 7, 3).error
        - (1 + 4 / 18) * federated(given, step / 2, 3).error
    )
    assert more == pytest.approx(0.5 * 2.0 * (1 / 8) ** 2 * (4 / 18) * 4.0)


def test_the_loss_gap_goes_from_delta_to_the_floor() -> None:
    descent = sgd(Given(1.0, 5.0, pl=0.2, sigma_sq=3.0, lambda_min=0.5, lambda_max=0.5), 0.5)
    assert descent.loss_gap(0) == 5.0
    assert descent.floor == pytest.approx(0.5 * 3.0 / (2 * 0.2))  # step L sigma^2 / (2 mu)
    assert descent.loss_gap(10_000) == pytest.approx(descent.floor)


# ---- Spectrum -----------------------------------------------------------------------------------


def spec(kind: str = "orthonormal", **changed: object) -> SketchSpec:
    return replace(SketchSpec(kind, "right", 3, 8, 0, 0, density=0.5), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SKETCHES)
def test_the_spectrum_is_that_of_drawn_projections(kind: str) -> None:
    side = spec(kind, side="left", dim=5, rank=2)
    layers = [spec(kind), side]
    found = over_layers(layers)
    values = []
    for layer in layers:
        total = torch.zeros(layer.dim, layer.dim, dtype=torch.float64)
        for index in range(1200):
            A = replace(layer, index=index).draw()
            A = A if layer.side == "right" else A.mT
            total += torch.linalg.pinv(A) @ A
        values.append(torch.linalg.eigvalsh(total / 1200))
    spread = torch.cat(values)
    assert found.lambda_min == pytest.approx(float(values[0].mean()), abs=0.03)
    assert found.lambda_max == pytest.approx(float(values[1].mean()), abs=0.03)
    assert float(spread.min()) == pytest.approx(found.lambda_min, abs=0.05)


def test_layers_trained_in_full_have_eigenvalue_one() -> None:
    assert over_layers([spec()], dense=True) == Constants(3 / 8, 1.0)
    assert over_layers([], dense=True) == Constants(1.0, 1.0)
    with pytest.raises(ConfigError, match="no layer is trained"):
        over_layers([])


def downlink(**changed: object) -> RoundInstructions:
    factors = {"B": to_train((4, 3)), "A": spec()}
    return replace(RoundInstructions({"w": Adapter.of(factors, 1.0)}, {}), **changed)  # type: ignore[arg-type]


def test_the_spectrum_is_read_off_a_downlink() -> None:
    assert of_downlink(downlink()) == Constants(3 / 8, 3 / 8)
    assert of_downlink(downlink(dense={"bias": to_train((4,))})) == Constants(3 / 8, 1.0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ranks": torch.tensor([1, 2])}, "rank budgets"),
        (
            {"adapters": {"w": Adapter.of({"B": to_train((4, 3)), "A": to_train((3, 8))}, 1.0)}},
            "0 are sketched",
        ),
    ],
)
def test_rounds_that_no_theorem_covers_are_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        of_downlink(downlink(**changed))


def test_a_cover_is_refused_by_the_theorems_on_independent_sketches() -> None:
    given = constants(spec(blocks="cover"))
    with pytest.raises(ConfigError, match="lambda_min is 0"):
        gd(Given(1.0, 1.0, lambda_min=given.lambda_min, lambda_max=given.lambda_max), 0.5)


# ---- Refusals -----------------------------------------------------------------------------------

ONE = Given(smoothness=2.0, gap=1.0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: gd(ONE, 0.51), r"step is 0.51.*\(0, 0.5\]"),
        (lambda: sgd(ONE, 0.0), "step is 0"),
        (lambda: cover(ONE, 0.6, 2), "step is 0.6"),
        (lambda: cover(ONE, 0.5, 0), "blocks is 0"),
        (lambda: gd_link(ONE, 0.51, 2), r"step is 0.51.*\(0, 0.5\]"),
        (lambda: gd_link(ONE, 0.5, 0), "rounds is 0"),
        (lambda: noisy_link(sgd(ONE, 0.5), 0), "rounds is 0"),
        (lambda: federated(ONE, 0.13, 2), r"step is 0.13.*\(0, 0.125\]"),
        (lambda: federated(ONE, 0.01, 2, 3, 4), "cohort=4"),
        (lambda: reshuffling(replace(ONE, zeta_sq=1.0), 0.01, 2), "zeta_sq is 1.0"),
        (lambda: gd(ONE, 0.5).loss_gap(3), "no PL constant"),
        (lambda: Given(0.0, 1.0), "smoothness=0.0"),
        (lambda: Given(1.0, -1.0), "gap=-1.0"),
        (lambda: Given(1.0, 1.0, pl=1.1), "pl is 1.1"),
        (lambda: Given(1.0, 1.0, lambda_min=0.5, lambda_max=0.4), "lambda_min is 0.5"),
        (lambda: logistic_pl(0.0, 1.0, 1.0), "curvature=0.0"),
    ],
)
def test_what_a_theorem_does_not_allow_is_refused(wrong: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        wrong()


# ---- The logistic loss --------------------------------------------------------------------------


def test_the_pl_constant_of_the_logistic_loss_holds_in_its_sublevel_set() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((60, 3)), rng.random(60) < 0.5
    signed = np.where(y[:, None], x, -x)

    def loss(w: Array) -> float:
        return float(np.logaddexp(0, -signed @ w).mean())

    def gradient(w: Array) -> Array:
        return -(signed / (1 + np.exp(signed @ w))[:, None]).mean(axis=0)

    best = np.zeros(3)
    for _ in range(50):
        p = 1 / (1 + np.exp(-signed @ best))
        hessian = (signed * (p * (1 - p))[:, None]).T @ signed / 60
        best = best - np.linalg.solve(hessian, gradient(best))
    curvature = float(np.linalg.eigvalsh(hessian)[0])
    norm = float(np.linalg.norm(x, axis=1).max())
    for gap in (0.01, 0.1, 1.0):
        mu = logistic_pl(curvature, norm, gap)
        inside = 0
        for _ in range(400):
            w = best + rng.exponential(1.0 + 10 * gap) * rng.standard_normal(3)
            above = loss(w) - loss(best)
            if 1e-8 < above <= gap:
                inside += 1
                assert (gradient(w) ** 2).sum() >= 2 * mu * above
        assert inside > 10
        assert mu < curvature


def test_the_pl_constant_falls_as_the_sublevel_set_grows() -> None:
    found = [logistic_pl(0.2, 2.0, gap) for gap in (1e-12, 1e-3, 0.1, 10.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(0.2, rel=1e-3)
