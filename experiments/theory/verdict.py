"""Curves of one case, the bounds on them, and whether they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedraclora.errors import ConfigError
from fedraclora.experiments.theory.bounds import (
    Descent,
    Given,
    cover,
    federated,
    gd,
    gd_link,
    noisy_link,
    reshuffling,
    rounding,
    sgd,
)
from fedraclora.experiments.theory.cases import TheoryCase
from fedraclora.experiments.theory.problems import MEASURES, federate, problem, start_of
from fedraclora.protocol.quantized import FULL
from fedraclora.run.ledger import column

Vector = npt.NDArray[np.float64]

ERRORS = 3  # standard errors of the mean that a curve may lie above its bound
ROUNDING = 1e-12  # of the initial value: the rounding error of a computed gap


Path = dict[str, Vector]  # what one seed measured after 0 to T rounds


def run(case: TheoryCase, seed: int) -> Path:
    """Run one seed of a case; give each of `MEASURES`, and ``uplink``, bytes sent so far."""
    ground = problem(case.problem)
    strategy = federate(
        ground.task,
        case.method,
        case.local,
        rounds=case.rounds,
        cohort=case.taking_part,
        seed=seed,
        measure=ground.measure,
        kind=case.kind,
    )
    rows = strategy.recorder.ledger.rows
    measures = {key: column(rows, "metrics", key) for key in MEASURES}
    return measures | {"uplink": column(rows, "uplink_total")}


@dataclass(frozen=True)
class Curve:
    """A quantity over rounds, over seeds, beside its bound.

    Attributes:
        quantity: ``gap`` or ``gradient``: f(W^t) - f* after t rounds, or the mean of
            ``||grad f(W^i)||^2`` over i < t.
        rounds: t of each point.
        mean: Over seeds.
        error: Standard error of the mean.
        worst: Greatest of the seeds.
        bound: Of the theorem.
        sure: Whether the bound is on every seed and not on the mean.
    """

    quantity: str
    rounds: Vector
    mean: Vector
    error: Vector
    worst: Vector
    bound: Vector
    sure: bool = False

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Curve:
        """Make a curve again of the values that `Judged.plain` writes of it."""
        names = ("rounds", "mean", "error", "worst", "bound")
        vectors = {name: np.array(plain[name], dtype=float) for name in names}
        return cls(plain["quantity"], **vectors, sure=bool(plain["sure"]))

    @property
    def excess(self) -> float:
        """Greatest amount by which the curve lies above the bound, over the initial value.

        In the mean, the curve is taken three standard errors lower, since on the isotropic
        quadratic the bound is the expectation itself.
        """
        measured = self.worst if self.sure else self.mean - ERRORS * self.error
        return float(((measured - self.bound) / self.mean[0]).max())

    @property
    def closest(self) -> float:
        """Greatest of measured over bound, after the first value (where gaps are equal)."""
        measured = self.worst if self.sure else self.mean
        visible = (self.bound > ROUNDING * self.mean[0]) & (self.rounds > 0)
        return float((measured[visible] / self.bound[visible]).max(initial=0.0))

    @property
    def holds(self) -> bool:
        """Return whether the curve lies within its bound."""
        return self.excess <= ROUNDING


@dataclass(frozen=True)
class Judged:
    """A case with its curves.

    Attributes:
        case: The case.
        descent: Constants of the theorem.
        curves: By quantity: the gradient always, the gap where a PL constant is known.
        gaps: Mean gap after 0 to T rounds, whether bounded or not.
        uplink: Bytes sent up after 0 to T rounds, mean over seeds.
    """

    case: TheoryCase
    descent: Descent
    curves: dict[str, Curve]
    gaps: Vector
    uplink: Vector

    @property
    def holds(self) -> bool:
        """Return whether every curve lies within its bound."""
        return all(curve.holds for curve in self.curves.values())

    def plain(self) -> dict[str, object]:
        """Convert everything to plain values."""
        curves = {
            key: {
                **{k: np.asarray(v).tolist() for k, v in vars(curve).items()},
                "excess": curve.excess,
                "holds": curve.holds,
            }
            for key, curve in self.curves.items()
        }
        return {
            "name": self.case.name,
            "case": asdict(self.case),
            "step": self.case.step,
            "local_steps": self.case.local_steps,
            "given": asdict(self.descent.given),
            "progress": self.descent.progress,
            "error": self.descent.error,
            "source": self.descent.source,
            "holds": self.holds,
            "gap": self.gaps.tolist(),
            "uplink_bytes": self.uplink.tolist(),
            "curves": curves,
        }


def judge(case: TheoryCase, paths: list[Path]) -> Judged:
    """Check the paths of a case's seeds against its theorem.

    sigma^2 and zeta^2 are the greatest along all paths, which is no less than their expectation
    at any round.
    """
    table = {key: np.stack([path[key] for path in paths]) for key in MEASURES}
    descent = theorem(case, {key: float(table[key].max()) for key in ("sigma_sq", "zeta_sq")})
    seen = np.arange(0, case.rounds + 1, case.period)
    times = np.arange(len(seen))
    gaps, squares = table["gap"][:, seen], table["gradient_sq"][:, seen]
    running = np.cumsum(squares, axis=1)[:, :-1] / times[1:]
    sure = case.theorem == "cover"
    bound = np.array([descent.gradient(int(t)) for t in times[1:]])
    curves = {"gradient": curve("gradient", seen[1:], running, bound, sure=sure)}
    if descent.given.pl is not None:
        bound = np.array([descent.loss_gap(int(t)) for t in times])
        curves["gap"] = curve("gap", seen, gaps, bound, sure=sure)
    uplink = np.mean([path["uplink"] for path in paths], axis=0)
    return Judged(case, descent, curves, table["gap"].mean(axis=0), uplink)


def curve(
    quantity: str, rounds: npt.NDArray[np.int64], values: Vector, bound: Vector, *, sure: bool
) -> Curve:
    """Summarize values [seeds, points]."""
    error = values.std(axis=0, ddof=1) / len(values) ** 0.5
    mean, worst = values.mean(axis=0), values.max(axis=0)
    return Curve(quantity, rounds.astype(float), mean, error, worst, bound, sure)


def theorem(case: TheoryCase, noise: dict[str, float]) -> Descent:
    """Build the theorem of a case; ``noise`` has sigma_sq of single samples, and zeta_sq."""
    if case.link > 1 and (case.theorem == "cover" or case.kind != FULL):
        raise ConfigError(
            f"{case.name}: no theorem is about links of several rounds as covers or in fewer bits; "
            "take link=1"
        )
    ground = problem(case.problem)
    spectrum = case.spectrum()
    steps = case.theorem in {"sgd", "reshuffling", "federated"}
    given = Given(
        smoothness=case.smoothness(ground),
        gap=ground.measure(start_of(ground.task))["gap"],
        pl=ground.pl if ground.pl_everywhere or not steps else None,
        sigma_sq=noise["sigma_sq"] * ground.batch_variance(case.batch) if steps else 0.0,
        zeta_sq=noise["zeta_sq"] if case.theorem == "federated" else 0.0,
        lambda_min=spectrum.lambda_min,
        lambda_max=spectrum.lambda_max,
        curvature=ground.curvature,
    )
    if case.theorem == "cover":
        return cover(given, case.step, case.period)
    if case.theorem == "gd_link":
        return gd_link(given, case.step, case.link)
    if case.theorem == "gd":
        return gd(given, case.step, rounding(case.kind, case.kind))
    one = of_round(case, given)
    return noisy_link(one, case.link) if case.link > 1 else one


def of_round(case: TheoryCase, given: Given) -> Descent:
    """Build the theorem of one round with noise."""
    if case.theorem == "sgd":
        return sgd(given, case.step, rounding(case.kind, case.kind))
    if case.theorem == "reshuffling":
        return reshuffling(given, case.step, case.local_steps)
    ground = problem(case.problem)
    return federated(given, case.step, case.local_steps, ground.clients, case.taking_part)
