"""What the benchmark holds its figures against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from typing_extensions import override

from fedraclora.experiments.bench.timing import Rows

SAME_LOSS = 1e-4  # relative: float32 sums of another order differ in the sixth digit


@dataclass(frozen=True)
class Bound:
    """A ratio of two rows of a workload, or one row alone, and how large it may or must be.

    Attributes:
        workload: Of both rows.
        over: The row above the line.
        under: The row below it; None takes ``over`` in seconds as it is.
        most: The largest value that is allowed, or None.
        least: The smallest, or None.
        by: ``cpu_seconds``, which a busy machine hardly moves, or ``seconds``.
    """

    workload: str
    over: str
    under: str | None
    most: float | None = None
    least: float | None = None
    by: str = "cpu_seconds"

    def value(self, rows: Rows) -> float | None:
        """The ratio; None where a row is missing."""
        names = (self.over,) if self.under is None else (self.over, self.under)
        if any(name not in rows for name in names):
            return None
        over, *under = (rows[name][self.by] for name in names)
        return float(over / under[0] if under else over)

    @override
    def __str__(self) -> str:
        """Describe the bound."""
        what = self.over if self.under is None else f"{self.over} / {self.under}"
        limit = f"at most {self.most:g}" if self.most is not None else f"at least {self.least:g}"
        return f"{self.workload}: {what} in {self.by.replace('_', ' ')}, {limit} wanted"


TABLE = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
BOUNDS = tuple(Bound(**row) for row in yaml.safe_load(TABLE))


def judge_rows(workload: str, rows: Rows, device: str = "cpu") -> dict[str, list[str]]:
    """Check the rows of a workload against the bounds; on a GPU the wall time alone counts.

    Returns:
        Lines for the reader: bounds that are ``kept``, those that are ``broken``, and those that
        are ``open``, since a row is missing.
    """
    lines: dict[str, list[str]] = {"kept": [], "broken": [], "open": []}
    for bound in BOUNDS:
        if bound.workload != workload:
            continue
        if device != "cpu" and bound.by == "cpu_seconds":
            bound = replace(bound, by="seconds")  # noqa: PLW2901
        value = bound.value(rows)
        if value is None:
            lines["open"].append(f"{bound}; a row is missing")
            continue
        high = bound.most is not None and value > bound.most
        low = bound.least is not None and value < bound.least
        lines["broken" if high or low else "kept"].append(f"{bound}; it is {value:.4g}")
    return lines


def disagreements(rows: Rows) -> list[str]:
    """List the rows of one algorithm that ended at another loss than the first of them."""
    losses = {name: row["loss"] for name, row in rows.items() if "loss" in row}
    if not losses:
        return []
    first, reference = next(iter(losses.items()))
    return [
        f"{name} ended at training loss {loss:.6g}, {first} at {reference:.6g}: not the same work"
        for name, loss in losses.items()
        if not abs(loss - reference) <= SAME_LOSS * abs(reference)
    ]
