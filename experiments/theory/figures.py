"""The figures of ``fedraclora theory``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from fedraclora.experiments.theory.counter_example import CHAIN, Outcome
from fedraclora.experiments.theory.slowdown import Slowdown
from fedraclora.experiments.theory.verdict import ERRORS, Curve, Judged
from fedraclora.plots.comparison import Measured, Panel, bounds_figure

GAP = ("round", "f(W) - f*, over the first")
GRADIENT = ("round", "mean of ||grad f||² so far, over the first")


FIGURES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def draw(
    judged: Sequence[Judged],
    found: Sequence[Outcome],
    noisy: Sequence[Outcome],
    slow: Sequence[Slowdown],
    out: Path,
) -> None:
    """Write all figures into a folder."""
    for name, figure in FIGURES.items():
        drawn = [panel(judged, *words) for words in figure["panels"]]
        bounds_figure(figure["title"], drawn, figure["columns"], out / f"{name}.png")
    title = "3 x 3 quadratic, M = diag(10, 1, ..., 1), rank 1"
    _counter_example(title, found, CHAIN, out / "counter_example.png")
    title = "3 x 3, noise where f is flat"
    _counter_example(title, noisy, 1, out / "noise_example.png")
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


def _counter_example(title: str, found: Sequence[Outcome], steps: int, path: Path) -> None:
    panels = []
    for share in dict.fromkeys(o.share for o in found):
        curves = {}
        for o in (o for o in found if o.share == share):
            label = o.method + (f" ({o.diverged} of {o.seeds} diverged)" if o.diverged else "")
            median = np.array(o.median)
            curves[label] = Measured(steps * np.arange(len(median), dtype=np.float64), median)
        panels.append(
            Panel(
                f"step {share:g} / L",
                ("step", "f(W) - f*, median of the seeds"),
                curves,
                floor=1e-6,
            )
        )
    bounds_figure(title, panels, len(panels), path)


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
