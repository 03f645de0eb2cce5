"""The figures of ``fedraclora theory``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.theory.counter_example import CHAIN, Outcome
from experiments.theory.slowdown import Slowdown
from experiments.theory.verdict import ERRORS, Curve, Judged
from fedraclora.plots import Measured, Panel, bounds_figure

GAP = ("round", "f(W) - f*, over the first")
GRADIENT = ("round", "mean of ||grad f||² so far, over the first")


def draw(
    judged: Sequence[Judged], found: Sequence[Outcome], slow: Sequence[Slowdown], out: Path
) -> None:
    """Write all figures into a folder."""
    _rates(judged, out / "rates.png")
    _sketches(judged, out / "sketches.png")
    _stochastic(judged, out / "stochastic.png")
    _covers(judged, out / "cover.png")
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


def _rates(judged: Sequence[Judged], path: Path) -> None:
    panels = [
        panel(judged, "rates/isotropic", "gap", "isotropic quadratic (the bound is exact), n = 12"),
        panel(judged, "rates/linear", "gap", "linear regression, right sketch, n = 12"),
        panel(judged, "rates/linear, left", "gap", "linear regression, left sketch, m = 6"),
        panel(judged, "rates/logistic", "gap", "logistic regression, n = 8"),
        panel(judged, "rates/linear", "gradient", "linear regression, gradient"),
        panel(judged, "rates/logistic", "gradient", "logistic regression, gradient"),
    ]
    title = "Gradient descent with step 1/L by rank: mean of the seeds ± 3 standard errors"
    bounds_figure(title, panels, 3, path)


def _sketches(judged: Sequence[Judged], path: Path) -> None:
    panels = [
        panel(judged, "sketches/right", "gap", "right, r = 4 of n = 12"),
        panel(judged, "sketches/left", "gap", "left, r = 2 of m = 6"),
    ]
    bounds_figure("Linear regression by sketch: E[H] decides", panels, 2, path)


def _stochastic(judged: Sequence[Judged], path: Path) -> None:
    names = list(
        dict.fromkeys(j.case.panel for j in judged if j.case.theorem not in {"gd", "cover"})
    )
    names.sort(key=lambda name: "logistic" in name)
    panels = [
        panel(judged, name, "gap" if "linear" in name else "gradient", name.partition("/")[2])
        for name in names
    ]
    title = "Noise, local steps and cohorts: mean of the seeds ± 3 standard errors"
    bounds_figure(title, panels, len(names) // 2, path)


def _covers(judged: Sequence[Judged], path: Path) -> None:
    titles = {
        "linear": "linear regression, condition 8",
        "near-isotropic": "linear regression, condition 1.3",
    }
    panels = [panel(judged, f"cover/{name}", "gap", title) for name, title in titles.items()]
    title = (
        "Blocks without replacement (worst seed, bound on every seed) and independent ones (mean)"
    )
    bounds_figure(title, panels, 2, path)


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
    def by_rank(values: Mapping[str, list[float]]) -> dict[str, Measured]:
        known = {s.panel.partition("/")[2]: s for s in slow if len(s.shares) > 1}
        return {
            f"{name}, to {known[name].accuracy:.0%}": Measured(
                np.array([1 / share for share in known[name].shares]),
                np.array(values[known[name].panel]),
            )
            for name in known
        }

    rounds = {s.panel: [r / s.rounds[-1] for r in s.rounds] for s in slow if s.rounds}
    uplink = {s.panel: [u / s.uplink[-1] for u in s.uplink] for s in slow if s.uplink}
    panels = [
        Panel(
            "rounds to an accuracy, over those at full rank",
            ("dim / r", "rounds, relative"),
            {
                **by_rank(rounds),
                "proportional": Measured(np.array([1.0, 12.0]), np.array([1.0, 12.0])),
            },
            log="xy",
            marks=True,
        ),
        Panel(
            "uplink to the same accuracy",
            ("dim / r", "bytes of all clients, relative"),
            by_rank(uplink),
            log="x",
            marks=True,
        ),
    ]
    bounds_figure("What a small rank costs", panels, 2, path)
