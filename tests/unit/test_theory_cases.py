"""The problems, cases and verdicts of ``fedraclora theory``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call

from fedraclora.data.clients import PartitionedData
from fedraclora.data.task import LOSSES
from fedraclora.errors import ConfigError
from fedraclora.experiments.theory import examples
from fedraclora.experiments.theory.cases import SCALE, TheoryCase, all_cases
from fedraclora.experiments.theory.command import TheoryConfig
from fedraclora.experiments.theory.examples import Trial
from fedraclora.experiments.theory.figures import slowdowns
from fedraclora.experiments.theory.problems import (
    MEASURES,
    PROBLEMS,
    WEIGHT,
    Problem,
    federate,
    problem,
    start_of,
)
from fedraclora.experiments.theory.verdict import Curve, Path, judge, run, theorem
from fedraclora.protocol.quantized import FULL, ROUNDED
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch import SKETCHES

FEDERATED = [name for name in PROBLEMS if "8 clients" in name]


def sample_gradients(ground: Problem, weight: torch.Tensor) -> torch.Tensor:
    """Gradients of single samples by autograd, [M, S, m n]."""
    data = ground.task.train
    assert isinstance(data, PartitionedData)
    x, y = data.samples.inputs["x"], data.samples.target
    loss = LOSSES[ground.task.loss]

    def one(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        output = functional_call(ground.task.model, {WEIGHT: w}, (x[None],))
        return loss(output, y[None])[0].sum()

    found = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(weight, x, y)
    return found.reshape(ground.clients, -1, weight.numel())


@pytest.mark.parametrize("name", PROBLEMS)
def test_measures_are_those_of_single_gradients(name: str) -> None:
    ground = problem(name)
    shape = start_of(ground.task)[WEIGHT].shape
    weight = torch_normal(generator(0, "test", name), *shape)
    found = ground.measure({WEIGHT: weight})
    g = sample_gradients(ground, weight)
    own, mean = g.mean(dim=1), g.mean(dim=(0, 1))
    wanted = {
        "gradient_sq": mean.square().sum(),
        "sigma_sq": (g - own[:, None]).square().sum(dim=2).mean(),
        "zeta_sq": (own - mean).square().sum(dim=1).mean(),
    }
    for key, value in wanted.items():
        assert found[key] == pytest.approx(float(value), rel=1e-9, abs=1e-9)
    assert found["gap"] > 0


@pytest.mark.parametrize("name", PROBLEMS)
def test_constants_of_a_problem_hold_along_random_segments(name: str) -> None:
    ground = problem(name)
    shape = start_of(ground.task)[WEIGHT].shape
    rng = generator(1, "test", name)
    samples = ground.each.shape[1]
    batch = min(48, samples)
    for _ in range(10):
        near, far = torch_normal(rng, *shape), torch_normal(rng, *shape)
        change = sample_gradients(ground, near) - sample_gradients(ground, far)
        distance = float((near - far).norm())
        assert float(change.norm(dim=2).max()) <= float(ground.each.max()) * distance + 1e-12
        assert float(change.mean(dim=(0, 1)).norm()) <= ground.smoothness * distance + 1e-12
        rows = torch.from_numpy(rng.permutation(samples)[:batch])
        batches = change[:, rows].mean(dim=1).norm(dim=1)
        assert float(batches.max()) <= ground.batch_smoothness(batch) * distance + 1e-12
        curved = float(((near - far).flatten() * change.mean(dim=(0, 1))).sum()) / distance**2
        assert curved >= ground.curvature - 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_pl_inequality_holds_where_it_is_said_to(name: str) -> None:
    ground = problem(name)
    start = start_of(ground.task)
    limit = ground.measure(start)["gap"]
    rng, inside = generator(2, "test", name), 0
    for scale in (0.01, 0.1, 0.3, 1.0) * 10:
        found = ground.measure({WEIGHT: scale * torch_normal(rng, *start[WEIGHT].shape)})
        if ground.pl_everywhere or found["gap"] <= limit:
            inside += 1
            assert found["gradient_sq"] >= 2 * ground.pl * found["gap"] * (1 - 1e-9)
    assert inside >= 5


def test_the_variance_of_a_batch_without_replacement_is_that_of_all_batches() -> None:
    ground = problem("isotropic")  # 12 samples
    g = sample_gradients(ground, torch_normal(generator(3, "test"), 6, 12))[0]
    rows = torch.combinations(torch.arange(12), 3)
    spread = (g[rows].mean(dim=1) - g.mean(dim=0)).square().sum(dim=1).mean()
    single = (g - g.mean(dim=0)).square().sum(dim=1).mean()
    assert ground.batch_variance(3) * float(single) == pytest.approx(float(spread), rel=1e-12)
    assert ground.batch_variance(12) == 0


def test_every_case_has_a_theorem_and_its_step_is_the_one_the_ledger_logs() -> None:
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    without_noise = {"gd", "gd_link", "cover"}
    assert {c.theorem for c in cases} == {*without_noise, "sgd", "reshuffling", "federated"}
    assert {c.train for c in cases} == {"A", "B"}
    for case in cases:
        descent = theorem(case, {"sigma_sq": 1.0, "zeta_sq": 1.0})
        assert descent.progress > 0
        assert (descent.error > 0) == (case.theorem not in without_noise)


def test_no_kind_of_sketch_or_of_numbers_is_left_out() -> None:
    for side in ("left", "right"):
        assert {c.sketch for c in all_cases() if c.panel == f"sketches/{side}"} == {*SKETCHES}
    for name in ("gradient descent", "SGD"):
        kinds = {c.kind for c in all_cases() if c.panel == f"fewer bits/{name}"}
        known = {k for k in ROUNDED if not k.startswith("eden")}  # those have no runs on record
        assert kinds == {FULL, *known}


@pytest.mark.parametrize("theorem_", ["gd", "sgd", "federated", "cover"])
def test_a_run_takes_the_step_and_the_clients_of_its_case(theorem_: str) -> None:
    least = {"federated": 3}.get(theorem_)  # a cohort, not all
    case = next(c for c in all_cases() if c.theorem == theorem_ and c.cohort == least)
    ground = problem(case.problem)
    strategy = federate(
        ground.task,
        case.method,
        case.local,
        rounds=1,
        cohort=case.taking_part,
        seed=0,
        measure=ground.measure,
    )
    row = strategy.recorder.ledger.rows[-1]
    step = row["effective_step"]
    assert isinstance(step, dict)
    assert step["gamma_min"] == step["gamma_max"] == pytest.approx(case.step)
    assert step["lr"] == pytest.approx(case.step / SCALE**2)
    assert row["cohort"] == case.taking_part
    assert row["local_steps"] == case.local_steps * case.taking_part


def test_one_cover_of_the_isotropic_quadratic_ends_at_its_optimum() -> None:
    case = TheoryCase("p", "l", "isotropic", "cover", 4, 3)
    found = run(case, 0)
    assert case.period == 3
    assert found["gap"][2] > 1
    assert found["gap"][3] < 1e-25


def paths(gaps: list[list[float]]) -> list[Path]:
    zeros = np.zeros(len(gaps[0]))
    return [
        {
            key: np.array(g) if key in {"gap", "gradient_sq"} else zeros
            for key in (*MEASURES, "uplink")
        }
        for g in gaps
    ]


def test_a_curve_above_its_bound_is_seen() -> None:
    case = TheoryCase("p", "l", "isotropic", "gd", 6, 2)  # leaves a half, and Delta is 32.7
    start = problem("isotropic").measure(start_of(problem("isotropic").task))["gap"]
    exact = [start, start / 2, start / 4]
    noisy = [[g * f for g in exact] for f in (0.9, 1.1, 1.0)]
    assert judge(case, paths([exact, exact])).curves["gap"].holds
    assert judge(case, paths(noisy)).curves["gap"].holds
    above = [[start, 0.6 * start, 0.25 * start]] * 3
    judged = judge(case, paths(above))
    assert not judged.curves["gap"].holds
    assert judged.curves["gap"].excess == pytest.approx(0.1)
    assert judged.curves["gap"].closest == pytest.approx(1.2)
    assert not judged.holds


def test_three_standard_errors_are_granted_and_no_more() -> None:
    t = np.array([0.0, 1.0])
    for mean, holds in ((1.29, True), (1.31, False)):
        curve = Curve(
            "gap", t, np.array([2.0, mean]), np.array([0.0, 0.1]), t, np.array([2.0, 1.0])
        )
        assert curve.holds is holds
    ones, worst = np.ones(2), np.array([0.0, 1.2])
    sure = Curve("gap", t, ones, ones, worst, np.array([1.0, 1.1]), sure=True)
    assert not sure.holds


def test_rounds_and_uplink_to_an_accuracy_are_read_off_the_curves() -> None:
    cases = [c for c in all_cases() if c.panel == "rates/isotropic" and c.rank in {6, 12}]
    judged = [judge(case, [run(case, seed) for seed in range(3)]) for case in cases]
    found = next(s for s in slowdowns(judged) if s.panel == "rates/isotropic")
    assert found.shares == [0.5, 1.0]
    assert found.rounds[1] == 1  # one step of size 1 / L ends it
    assert 5 <= found.rounds[0] <= 9  # a half is left of each, in the mean
    assert found.uplink == [8 * 6 * 6 * found.rounds[0], 8 * 6 * 12]  # bytes of r m numbers a round


# ---- The counter-example ------------------------------------------------------------------------


def test_the_regression_is_the_quadratic_of_the_paper() -> None:
    task = examples.quadratic()
    data = task.train
    assert isinstance(data, PartitionedData)
    M = examples.M
    W = torch_normal(generator(4, "test"), 3, 3)
    output = functional_call(task.model, {WEIGHT: W}, (data.samples.inputs["x"],))
    loss = float(LOSSES[task.loss](output, data.samples.target)[0].mean())
    quadratic = float((M * W.square() + W).sum())
    rest = float((1 / (4 * M)).sum())  # f* is its negative
    assert loss == pytest.approx(quadratic + rest)
    assert examples.from_optimum({WEIGHT: W})["gap"] == pytest.approx(quadratic + rest)
    assert examples.from_optimum(start_of(task))["gap"] == pytest.approx(examples.START)


@pytest.mark.slow
def test_full_training_and_rac_lora_get_there_where_asymmetric_lora_does_not() -> None:
    gaps = {
        m: examples.run_trial(Trial("counter-example", m, 1.0, 20, 0))[-1]
        for m in ("full", "RAC-LoRA", "asymmetric LoRA")
    }
    assert gaps["full"] < 1e-10
    assert gaps["RAC-LoRA"] < 0.05
    assert gaps["asymmetric LoRA"] > 0.5


def test_paths_that_diverge_are_counted() -> None:
    trials = [Trial("counter-example", "LoRA", 1.0, 2, seed) for seed in range(3)]
    gaps = [np.array(g) for g in ([2.0, 1.0, 0.5], [2.0, np.inf, np.inf], [2.0, 1.5, 0.7])]
    (found,) = examples.outcomes_of(trials, gaps)
    assert (found.seeds, found.diverged) == (3, 1)
    assert found.median == [2.0, 1.5, 0.7]
    assert (found.best, found.worst) == (0.5, np.inf)


@pytest.mark.slow
def test_a_basis_of_noisy_links_alone_ends_beside_the_optimum() -> None:
    name = "a noisy basis"
    methods = examples.EXAMPLES[name].methods
    gaps = {m: examples.run_trial(Trial(name, m, 0.5, 30, 1)) for m in methods}
    kept = gaps.pop("kept, r = 1")
    assert kept[30] == pytest.approx(kept[15], rel=1e-6)
    assert kept[30] > 0.5
    assert all(gap[30] < 0.05 for gap in gaps.values())


def test_the_noise_of_the_example_has_mean_zero_and_no_loss() -> None:
    task = examples.noisy()
    data = task.train
    assert isinstance(data, PartitionedData)
    W = torch_normal(generator(4, "test"), 3, 3)
    output = functional_call(task.model, {WEIGHT: W}, (data.samples.inputs["x"],))
    losses, _ = examples.loss(output, data.samples.target)
    assert float(losses.mean()) == pytest.approx(examples.beside_noise({WEIGHT: W})["gap"])
    assert float(losses[0] - losses[1]) == pytest.approx(2 * examples.SIGMA * float(W[0, 0]))
    assert examples.beside_noise(start_of(task)) == {"gap": 1.0}


def test_links_on_the_last_have_the_constants_of_both_sides() -> None:
    c = next(c for c in all_cases() if c.kept_scale == "auto").spectrum()  # r = 4, k = 2; 6 x 12
    assert (c.lambda_min, c.lambda_max) == pytest.approx((2 / 10, 4 / 6))
    c = next(c for c in all_cases() if c.pairs).spectrum()
    assert (c.lambda_min, c.lambda_max) == pytest.approx((4 / 24, (4 / 12 + 1) / 2))


# ---- Settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"size": "big"}, "big"), ({"seeds": 1}, "seeds=1"), ({"jobs": 0}, "jobs=0")],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TheoryConfig(**wrong)  # type: ignore[arg-type]


def test_an_unknown_problem_is_refused() -> None:
    with pytest.raises(ConfigError, match="cubic"):
        problem("cubic")
