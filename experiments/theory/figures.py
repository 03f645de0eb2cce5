"""The figures and tables of ``fedraclora theory``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedraclora.experiments.theory.examples import CHAIN, START, Outcome
from fedraclora.experiments.theory.verdict import ERRORS, Curve, Judged
from fedraclora.plots.comparison import MeasuredCurve, Panel, bounds_figure
from fedraclora.terminal.tables import TextTable

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
        j.case.label: normalized(j.curves[quantity])
        for j in judged
        if j.case.panel == name and quantity in j.curves
    }
    return Panel(title, GAP if quantity == "gap" else GRADIENT, curves)


def normalized(curve: Curve) -> MeasuredCurve:
    """Divide a curve by its first mean; a bound on every seed is shown beside the worst one."""
    first = curve.mean[0]
    if curve.sure:
        return MeasuredCurve(curve.rounds, curve.worst / first, None, curve.bound / first)
    spread = ERRORS * curve.error / first
    return MeasuredCurve(curve.rounds, curve.mean / first, spread, curve.bound / first)


def _counter_example(title: str, found: Sequence[Outcome], steps: int, path: Path) -> None:
    panels = []
    for share in dict.fromkeys(o.share for o in found):
        curves = {}
        for o in (o for o in found if o.share == share):
            label = o.method + (f" ({o.diverged} of {o.seeds} diverged)" if o.diverged else "")
            median = np.array(o.median)
            curves[label] = MeasuredCurve(steps * np.arange(len(median), dtype=np.float64), median)
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
    def by_rank(quantity: str) -> dict[str, MeasuredCurve]:
        """Over the value at full rank."""
        curves = {}
        for s in slow:
            if len(s.shares) > 1:
                values = np.array(getattr(s, quantity))
                name = f"{s.panel.partition('/')[2]}, to {s.accuracy:.0%}"
                curves[name] = MeasuredCurve(1 / np.array(s.shares), values / values[-1])
        return curves

    same = np.array([1.0, 12.0])
    panels = [
        Panel(
            "rounds to an accuracy, over those at full rank",
            ("dim / r", "rounds, relative"),
            by_rank("rounds") | {"proportional": MeasuredCurve(same, same)},
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


def report_tables(report: Mapping[str, Any]) -> list[TextTable]:
    """Make all tables from a report, as `fedraclora theory` writes it to ``theory.json``."""
    found = [Outcome(**each) for each in report["counter_example"]]
    lost = [Outcome(**each) for each in report["noise_example"]]
    return [
        bounds_table(report["cases"]),
        example_table("3 x 3, rank 1", found, CHAIN, START),
        example_table("3 x 3, noise in one entry", lost, 1, 1.0),
        slowdown_table([Slowdown(**each) for each in report["slowdown"]]),
    ]


def bounds_table(cases: Sequence[Mapping[str, Any]]) -> TextTable:
    """Make the table of verdicts, one line per case of a report (`Judged.plain`)."""
    records = []
    for case in cases:
        curves = {key: Curve.of_plain(plain) for key, plain in case["curves"].items()}
        shown = curves.get("gap", curves["gradient"])
        first = shown.mean[0]
        measured = shown.worst[-1] if shown.sure else shown.mean[-1]
        record: dict[str, object] = {
            "case": case["name"],
            "theorem": case["case"]["theorem"],
            "step x L": case["step"] * case["given"]["smoothness"],
            "lambda": case["given"]["lambda_min"],
            "quantity": shown.quantity,
            "measured": float(measured / first),
            "bound": float(shown.bound[-1] / first),
            "closest": max(curve.closest for curve in curves.values()),
            "verdict": "holds" if case["holds"] else "CROSSED",
        }
        records.append(record)
    note = (
        "measured, bound: after the last round, over the first value; of the gap f(W^T) - f* where "
        "a PL constant is known, else of the mean squared gradient norm. closest: greatest "
        "measured / bound over rounds and both quantities; of covers in the worst seed, else in "
        "the mean."
    )
    return TextTable.of(records, [note], _text)


def example_table(title: str, found: Sequence[Outcome], steps: int, start: float) -> TextTable:
    """Make the table of a counter-example's final gaps; a link has so many steps."""
    records: list[dict[str, object]] = [
        {
            title: o.method,
            "step x L": o.share,
            "steps": steps * (len(o.median) - 1),
            "diverged": f"{o.diverged} of {o.seeds}",
            "median gap": o.median[-1],
            "least": o.best,
            "greatest": o.worst,
        }
        for o in found
    ]
    return TextTable.of(records, [f"The gap at the start is {start:.3g}."], _text)


def slowdown_table(slow: Sequence[Slowdown]) -> TextTable:
    """Make the table of rounds and uplink to an accuracy, by rank."""
    records: list[dict[str, object]] = [
        {
            "problem": s.panel,
            "gap left": s.accuracy,
            "r / dim": share,
            "rounds": rounds,
            "rounds x r / dim": rounds * share,
            "uplink MB": uplink / 1e6,
        }
        for s in slow
        for share, rounds, uplink in zip(s.shares, s.rounds, s.uplink, strict=True)
    ]
    return TextTable.of(records, text=_text)


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


SERIES = yaml.safe_load(Path(__file__).with_name("slowdown.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Slowdown:
    """One problem at several ranks, the smallest first; ranks that did not get there are left out.

    Attributes:
        panel: Of the cases.
        accuracy: Gap that is left, over the first, in the mean over seeds.
        shares: r / dim.
        rounds: Until the mean gap is that small.
        uplink: Bytes that all clients sent by then.
    """

    panel: str
    accuracy: float
    shares: list[float]
    rounds: list[int]
    uplink: list[float]


def slowdowns(judged: Sequence[Judged]) -> list[Slowdown]:
    """Read rounds and uplink to an accuracy off the mean gaps."""
    found = []
    for panel, accuracy in SERIES.items():
        shares, rounds, uplink = [], [], []
        trained = {"A", "B"} if panel.endswith("left") else {"B"}
        cases = [j for j in judged if j.case.panel == panel and j.case.train in trained]
        for j in sorted(cases, key=lambda j: j.descent.given.lambda_min):
            there = np.flatnonzero(j.gaps <= accuracy * j.gaps[0])
            if there.size:
                shares.append(j.descent.given.lambda_min)
                rounds.append(int(there[0]))
                uplink.append(float(j.uplink[there[0]]))
        found.append(Slowdown(panel, accuracy, shares, rounds, uplink))
    return found
