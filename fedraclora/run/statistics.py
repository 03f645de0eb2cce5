"""Compute the statistics of runs that are compared, tuned or drawn, all from one table.

`rounds_of` reads runs into a frame of pandas with one row for each run and round:

- ``run``: the key of the run (a folder, a seed, the number of a trial);
- ``round``, ``value``: the round, and the metric after it (NaN where it is not finite);
  ``measured``: whether it was measured then;
- ``uplink``, ``downlink``, ``traffic``: bytes of all clients so far, up, down with catch-up, both;
- ``seconds``, ``virtual_seconds``: of rounds so far, on the wall and on a simulated clock;
- the columns of `OF_ROUND`, and ``dropped``, the number of clients that were dropped.

The other functions take such a frame, or one with the columns that they need, and return the rows
they choose: one for each run, or one for each round. Figures over seeds are a `Spread`; its sums
are exact, so that a table is the same whichever order the runs are in.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedraclora.evaluation.metrics import PERSONAL
from fedraclora.run.ledger import Row, column, metrics_of, number, round_seconds

if TYPE_CHECKING:  # half a second, which the commands that compare nothing do not spend
    from pandas import DataFrame, Series

OF_ROUND = {  # column -> where a row of the ledger has it
    "uplink": ("uplink_total",),
    "downlink": ("downlink_total",),
    "virtual_seconds": ("virtual_seconds",),
    "cohort": ("cohort",),
    "aggregation_error": ("report", "aggregation_error"),
    "rounding_up": ("rounding_up",),
    "rounding_down": ("rounding_down",),
}
STEADY = 5  # measured rounds that are averaged, at most


@dataclass(frozen=True)
class Spread:
    """Mean and spread of a figure over runs, for example over seeds.

    Attributes:
        count: How many values there are.
        mean: Their mean; not finite if one of them is not, or there is none.
        deviation: Standard deviation of the sample; NaN of one value, or without a finite mean.
    """

    count: int
    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Average all values."""
        found = [float(value) for value in values]
        mean = statistics.fmean(found) if found else math.nan
        whole = len(found) > 1 and math.isfinite(mean)
        return cls(len(found), mean, statistics.stdev(found) if whole else math.nan)

    @classmethod
    def of_known(cls, values: Iterable[float]) -> Spread:
        """Average the finite values."""
        return cls.of(value for value in values if math.isfinite(value))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(self.count) if self.count else math.nan

    def text(self, digits: int) -> str:
        """Write the mean, and the standard deviation if it is known."""
        shown = f" ± {self.deviation:.{digits}f}" if math.isfinite(self.deviation) else ""
        return f"{self.mean:.{digits}f}{shown}"


def metric_names(metric: str) -> tuple[str, str]:
    """Return a metric's name, and its name where each client has a model of its own."""
    return metric, f"{PERSONAL}{metric}"


def measured_value(row: Mapping[str, object], names: Sequence[str]) -> float | None:
    """Return the first of some metrics that a row has: NaN if it is no number, None without one."""
    found = metrics_of(row)
    return next((number(found, name) for name in names if name in found), None)


def traffic(row: Mapping[str, object]) -> float:
    """Return the bytes that all clients have sent and fetched so far, with catch-up."""
    return number(row, "uplink_total") + number(row, "downlink_total")


def rounds_of(runs: Mapping[Any, Sequence[Row]], names: Sequence[str]) -> DataFrame:
    """Read runs into the frame that the module describes.

    Args:
        runs: Rows of a ledger, by the key of the run.
        names: Of the metric; the first that a row has is its value.
    """
    import pandas as pd

    frames = [_rounds(rows, names).assign(run=run) for run, rows in runs.items()]
    return pd.concat(frames, ignore_index=True) if frames else _rounds([], names).assign(run=None)


def _rounds(rows: Sequence[Row], names: Sequence[str]) -> DataFrame:
    import pandas as pd

    values = [measured_value(row, names) for row in rows]
    dropped = [row.get("dropped") for row in rows]
    # Of a study the rows have one number instead: its runs share a machine, and it says nothing.
    timed = any(isinstance(row.get("seconds"), Mapping) for row in rows)
    seconds = [round_seconds(row) if timed else math.nan for row in rows]
    found = {name: column(rows, *path) for name, path in OF_ROUND.items()}
    return pd.DataFrame(
        {
            "round": column(rows, "round").astype(int),
            "measured": np.array([value is not None for value in values], dtype=bool),
            "value": np.array([math.nan if v is None else v for v in values], dtype=float),
            "traffic": found["uplink"] + found["downlink"],
            "seconds": np.cumsum(seconds, dtype=float),
            "dropped": np.array([len(d) if isinstance(d, list) else math.nan for d in dropped]),
            **found,
        }
    )


def last(frame: DataFrame) -> DataFrame:
    """Return the last row of each run, by run."""
    return frame.drop_duplicates("run", keep="last").set_index("run")


def first_reaching(frame: DataFrame, target: float | Series, *, higher: bool = True) -> DataFrame:
    """Return the first round of each run whose metric is no worse than a target, by run.

    Args:
        frame: Of runs; those that do not get there have no row in what is returned.
        target: For all, or one for each run, by run.
        higher: Whether more of the metric is better.
    """
    wanted = target if isinstance(target, int | float) else frame["run"].map(target)
    there = frame["value"] >= wanted if higher else frame["value"] <= wanted
    return frame[there].drop_duplicates("run").set_index("run")


def last_within(frame: DataFrame, budget: float, cost: str = "traffic") -> DataFrame:
    """Return the last measured round of each run that is within a budget, by run.

    The untrained model of round 0 does not count: a run whose first round costs more has no row.

    Args:
        frame: Of runs.
        budget: Most of the cost.
        cost: Its column.
    """
    return last(measured(frame)[lambda rows: (rows["round"] > 0) & (rows[cost] <= budget)])


def steady_within(frame: DataFrame, budget: float) -> DataFrame:
    """Return the last round of each run within so many bytes, with a steady metric, by run.

    One round is lucky or unlucky: the value is the mean of the last quarter of the rounds there,
    at most `STEADY` of them. A run whose first round costs more has the row of its untrained model.
    """
    import pandas as pd

    def of_run(rows: DataFrame) -> DataFrame:
        there = rows[(rows["traffic"] <= budget) & (rows["round"] > 0)]
        if there.empty:
            return rows.head(1)
        steady = there.tail(min(STEADY, math.ceil(len(there) / 4)))
        return steady.tail(1).assign(value=statistics.fmean(steady["value"]))

    runs = [of_run(rows) for _, rows in frame.groupby("run", sort=False)]
    return (pd.concat(runs) if runs else frame).set_index("run")


def measured(frame: DataFrame) -> DataFrame:
    """Keep the rounds at which the metric was measured."""
    return frame[frame["measured"]] if "measured" in frame else frame


def mean_curve(frame: DataFrame, run: Hashable) -> DataFrame:
    """Average runs, of several seeds say, at the rounds at which all of them have a metric.

    Args:
        frame: Of runs.
        run: The key of their mean.

    Returns:
        One row for each of these rounds: the mean of each column, and of the value its ``least``
        and ``greatest``; ``runs``, their number.
    """
    import pandas as pd

    names = [name for name in frame.columns if name not in {"run", "measured"}]
    known, runs = frame[np.isfinite(frame["value"])], frame["run"].nunique()
    common = known.groupby("round")["run"].transform("nunique") == runs
    ordered = known[common].sort_values("round", kind="stable")
    cells = ordered[names].to_numpy(dtype=float).reshape(-1, max(runs, 1), len(names))
    means = [[statistics.fmean(values) for values in at.T] for at in cells]
    values = cells[:, :, names.index("value")]
    curve = pd.DataFrame(means, columns=names, dtype=float).astype({"round": int})
    return curve.assign(run=run, runs=runs, least=values.min(axis=1), greatest=values.max(axis=1))


def paired(one: Series, other: Series) -> Spread:
    """Average the differences of runs of the same seeds.

    Args:
        one: A figure by seed.
        other: That which is taken off; seeds that only one of them has do not count.
    """
    both = one.index.intersection(other.index)
    return Spread.of(one[both] - other[both])


def frontier(frame: DataFrame, *, higher: bool) -> DataFrame:
    """Return the rounds that none beats: no other has as good a metric at as little traffic.

    Args:
        frame: Of runs; of rounds that are equal in both, the first is kept.
        higher: Whether more of the metric is better.

    Returns:
        By traffic; the metric gets better from one to the next.
    """
    rows = frame.sort_values(["traffic", "value"], ascending=[True, not higher], kind="stable")
    good = rows["value"].astype(float) * (1 if higher else -1)
    return rows[good > good.cummax().shift(fill_value=-math.inf)]


def ranks(values: Sequence[Sequence[float]]) -> list[int]:
    """Compute Pareto ranks: no point dominates rank 0, only rank 0 dominates rank 1, and so on.

    Example:
        >>> ranks([(3, 1), (2, 2), (2, 1), (1, 1)])
        [0, 0, 1, 2]
    """
    found, left = dict[int, int](), [*range(len(values))]

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(a >= b for a, b in zip(one, other, strict=True)) and [*one] != [*other]

    while left:
        first = [k for k in left if not any(beats(values[j], values[k]) for j in left)]
        found |= dict.fromkeys(first, max(found.values(), default=-1) + 1)
        left = [k for k in left if k not in found]
    return [found[k] for k in range(len(values))]
