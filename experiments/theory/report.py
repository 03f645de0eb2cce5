"""The tables of ``fedraclora theory``."""

from __future__ import annotations

from collections.abc import Sequence

from fedraclora.experiments.tables import Table
from fedraclora.experiments.theory.counter_example import Outcome
from fedraclora.experiments.theory.slowdown import Slowdown
from fedraclora.experiments.theory.verdict import Judged


def bounds_table(judged: Sequence[Judged]) -> Table:
    """Make the table of verdicts, one line per case."""
    records = []
    for j in judged:
        shown = j.curves.get("gap", j.curves["gradient"])
        given, first = j.descent.given, shown.mean[0]
        measured = shown.worst[-1] if shown.sure else shown.mean[-1]
        record: dict[str, object] = {
            "case": j.case.name,
            "theorem": j.case.theorem,
            "step x L": j.case.step * given.smoothness,
            "lambda": given.lambda_min,
            "quantity": shown.quantity,
            "measured": float(measured / first),
            "bound": float(shown.bound[-1] / first),
            "closest": max(curve.closest for curve in j.curves.values()),
            "verdict": "holds" if j.holds else "CROSSED",
        }
        records.append(record)
    note = (
        "measured, bound: after the last round, over the first value; of the gap f(W^T) - f* where "
        "a PL constant is known, else of the mean squared gradient norm. closest: greatest "
        "measured / bound over rounds and both quantities; of covers in the worst seed, else in "
        "the mean."
    )
    return Table.of(records, [note], _text)


def example_table(title: str, found: Sequence[Outcome], steps: int, start: float) -> Table:
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
    return Table.of(records, [f"The gap at the start is {start:.3g}."], _text)


def slowdown_table(slow: Sequence[Slowdown]) -> Table:
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
    return Table.of(records, text=_text)


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
