"""What a byte buys: the rows of a study at equal uplink, equal traffic and equal local steps.

The budgets are what the run that used least used in all its rounds. A run counts with its last
measured round that is within the budget: nothing is interpolated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from experiments.study.file import Study
from experiments.study.table import curve_of, final_lines, first_reaching, score, titled
from experiments.tables import Table
from fedraclora.plots import MEGABYTE
from fedraclora.run.ledger import Row, number

Plain = dict[str, object]
Curve = Sequence[Row]


def uplink(point: Row) -> float:
    """Bytes that all clients have sent so far."""
    return number(point, "uplink_total")


def traffic(point: Row) -> float:
    """Bytes sent both ways so far, with catch-up."""
    return uplink(point) + number(point, "downlink_total")


def budgets(study: Study, done: Mapping[str, Plain]) -> Table | None:
    """Compare the rows whose final runs are all there; None where there are no two of them.

    With a ``reference`` in the study, two more columns hold the rows against it, seed by seed: the
    mean difference of final runs, with its standard error; and the uplink at which a run first was
    as good as the reference's run of the same seed at its end, over the whole uplink of that run,
    as mean and standard deviation over the seeds that got there.

    Args:
        study: The study.
        done: Lines of its runs, by key.
    """
    finals = {row: final_lines(study, row, done) for row in study.rows}
    curves = {row: [curve_of(line) for line in lines] for row, lines in finals.items() if lines}
    if len(curves) < 2:
        return None
    names = {uplink: "uplink", traffic: "traffic"}
    least = {way: min(way(c[-1]) for runs in curves.values() for c in runs) for way in names}
    titles = {way: f"at {least[way] / MEGABYTE:.4g} MB of {name}" for way, name in names.items()}
    records = []
    for row, runs in curves.items():
        record: Plain = {
            "method": titled(row, finals[row][0], study.metric),
            "at equal local steps": _spread(finals[row], study.metric),
        }
        for way in names:
            points = [_last_within(curve, way, least[way]) for curve in runs]
            record[titles[way]] = _spread(points, study.metric)
        if study.reference in curves:
            against = _difference(finals[row], finals[study.reference], study.metric)
            record[f"less {study.reference}, ± standard error"] = against
            share = _share(runs, curves[study.reference], study.metric)
            record[f"uplink to the final {study.metric} of {study.reference} / its uplink"] = share
        records.append(record)
    cells = tuple(tuple(str(value) for value in record.values()) for record in records)
    return Table(tuple(records[0]), cells, tuple(records))


def _last_within(curve: Curve, way: Callable[[Row], float], budget: float) -> Row:
    """The last point whose bytes do not exceed the budget; the first has none."""
    return [point for point in curve if way(point) <= budget][-1]


def _spread(points: Sequence[Row], metric: str) -> str:
    """Mean and standard deviation of a metric over seeds."""
    scores = [score(point, metric) for point in points]
    spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.4f}{spread}"


def _difference(lines: Sequence[Plain], others: Sequence[Plain], metric: str) -> str:
    """Mean difference of runs of the same seeds, and its standard error; the seeds stand alike."""
    if lines is others:
        return ""
    found = [score(x, metric) - score(y, metric) for x, y in zip(lines, others, strict=True)]
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return f"{statistics.fmean(found):+.4f} ± {error:.4f}"


def _share(curves: Sequence[Curve], others: Sequence[Curve], metric: str) -> str:
    """Uplink to the final score of the other run of its seed, over that run's whole uplink."""
    shares = [
        uplink(point) / uplink(other[-1])
        for curve, other in zip(curves, others, strict=True)
        if (point := first_reaching(curve, metric, score(other[-1], metric))) is not None
    ]
    if not shares:
        return "not reached"
    spread = f" ± {statistics.stdev(shares):.3f}" if len(shares) > 1 else ""
    missed = f" ({len(shares)} of {len(curves)} runs)" if len(shares) < len(curves) else ""
    return f"{statistics.fmean(shares):.3f}{spread}{missed}"
