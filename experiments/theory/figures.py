"""The figures of ``fedraclora theory``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.theory.cases import ROUNDS
from experiments.theory.counter_example import CHAIN, Outcome
from experiments.theory.slowdown import Slowdown
from experiments.theory.verdict import ERRORS, Curve, Judged
from fedraclora.plots import Measured, Panel, bounds_figure

GAP = ("round", "f(W) - f*, over the first")
GRADIENT = ("round", "mean of ||grad f||² so far, over the first")


# Figure: its title, how many panels stand in a row, and of each the cases, the quantity, the title.
SPREAD = "mean of the seeds ± 3 standard errors"
FIGURES = {
    "rates": (
        f"Gradient descent with step 1/L by rank: {SPREAD}",
        3,
        (
            ("rates/isotropic", "gap", "isotropic quadratic (the bound is exact), n = 12"),
            ("rates/linear", "gap", "linear regression, right sketch, n = 12"),
            ("rates/linear, left", "gap", "linear regression, left sketch, m = 6"),
            ("rates/logistic", "gap", "logistic regression, n = 8"),
            ("rates/linear", "gradient", "linear regression, gradient"),
            ("rates/logistic", "gradient", "logistic regression, gradient"),
        ),
    ),
    "sketches": (
        "Linear regression by sketch: E[H] decides",
        2,
        (
            ("sketches/right", "gap", "right, r = 4 of n = 12"),
            ("sketches/left", "gap", "left, r = 2 of m = 6"),
        ),
    ),
    "stochastic": (
        f"Noise, local steps and cohorts: {SPREAD}",
        len(ROUNDS),
        tuple(
            (f"stochastic/{loss}, {name}", quantity, f"{loss}, {name}")
            for loss, quantity in (("linear", "gap"), ("logistic", "gradient"))
            for name in ROUNDS
        ),
    ),
    "fewer_bits": (
        f"Linear regression, numbers rounded up and down, each at its step: {SPREAD}",
        2,
        (
            ("fewer bits/gradient descent", "gap", "gradient descent, r = 4 of n = 12"),
            ("fewer bits/SGD", "gap", "SGD, r = 4 of n = 12"),
        ),
    ),
    "cover": (
        "Blocks without replacement (worst seed, bound on every seed) and independent ones (mean)",
        2,
        (
            ("cover/linear", "gap", "linear regression, condition 8"),
            ("cover/near-isotropic", "gap", "linear regression, condition 1.3"),
        ),
    ),
}


def draw(
    judged: Sequence[Judged], found: Sequence[Outcome], slow: Sequence[Slowdown], out: Path
) -> None:
    """Write all figures into a folder."""
    for name, (title, columns, panels) in FIGURES.items():
        drawn = [panel(judged, *words) for words in panels]
        bounds_figure(title, drawn, columns, out / f"{name}.png")
    _counter_example(found, out / "counter_example.png")
    _slowdowns(slow, out / "slowdown.png")


def panel(judged: Sequence[Judged], name: str, quantity: str, title: str) -> Panel:
    """Make the panel of the cases of a name."""
    curves = {
        j.case.label: normalised(j.curves[quantity])
        for j in judged
        if j.case.panel == name and quantity in j.curves
    }
    return Panel(title, GAP if quantity == "gap" else GRADIENT, curves)


def normalised(curve: Curve) -> Measured:
    """Divide a curve by its first mean; a bound on every seed is shown beside the worst one."""
    first = curve.mean[0]
    if curve.sure:
        return Measured(curve.rounds, curve.worst / first, None, curve.bound / first)
    spread = ERRORS * curve.error / first
    return Measured(curve.rounds, curve.mean / first, spread, curve.bound / first)


def _counter_example(found: Sequence[Outcome], path: Path) -> None:
    panels = []
    for share in dict.fromkeys(o.share for o in found):
        curves = {}
        for o in (o for o in found if o.share == share):
            label = o.method + (f" ({o.diverged} of {o.seeds} diverged)" if o.diverged else "")
            median = np.array(o.median)
            curves[label] = Measured(CHAIN * np.arange(len(median), dtype=np.float64), median)
        title = f"step {share:g} / L"
        panels.append(Panel(title, ("step", "f(W) - f*, median of the seeds"), curves, floor=1e-6))
    bounds_figure("3 x 3 quadratic, M = diag(10, 1, ..., 1), rank 1", panels, 2, path)


def _slowdowns(slow: Sequence[Slowdown], path: Path) -> None:
    def by_rank(quantity: str) -> dict[str, Measured]:
        """Over the value at full rank."""
        curves = {}
        for s in slow:
            if len(s.shares) > 1:
                values = np.array(getattr(s, quantity))
                name = f"{s.panel.partition('/')[2]}, to {s.accuracy:.0%}"
                curves[name] = Measured(1 / np.array(s.shares), values / values[-1])
        return curves

    same = np.array([1.0, 12.0])
    panels = [
        Panel(
            "rounds to an accuracy, over those at full rank",
            ("dim / r", "rounds, relative"),
            by_rank("rounds") | {"proportional": Measured(same, same)},
            log="xy",
            marks=True,
        ),
        Panel(
            "uplink to the same accuracy",
            ("dim / r", "bytes of all clients, relative"),
            by_rank("uplink"),
            log="x",
            marks=True,
        ),
    ]
    bounds_figure("What a small rank costs", panels, 2, path)
