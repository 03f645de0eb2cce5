"""Encode and summarize metrics that clients measure on their own samples (federated evaluation).

A client sends the sums behind its metrics (`fedraclora.evaluation.metrics`). From them the server
computes each metric of each client, and from their total the metric of all samples together. For a
metric that needs every score a client sends only the value; its value over all samples is unknown.

Under secure aggregation the server only sees the sum of the clients' integer vectors. A client
sends the sums behind its metrics; for each metric m the numbers 1, m and m squared, or zeros if it
is not defined; and a 1 in the bin of a histogram that contains m. Numbers have 128 bits, 40 of them
after the binary point, in pieces of 16 bits, whose sums fit into 32-bit words. Mean and deviation
over clients are therefore accurate to 2^-40 a client; percentiles come from the histogram, below
the true ones by less than a bin.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.errors import ClientError, WireError
from fedraclora.evaluation.evaluate import state_of
from fedraclora.evaluation.metrics import AFTER, Measure, RowOwners, higher_is_better
from fedraclora.privacy.secagg import FEW
from fedraclora.tree import Layout, Tree

Floats = npt.NDArray[np.float64]
OF_ONE = "value/"  # prefix of a metric of which only the value is sent


def scored(measure: Measure) -> list[str]:
    """List the metrics of which a client sends only the value."""
    return [n for n, metric in measure.metrics.items() if not metric.count.sums]


def sums_of(
    measure: Measure,
    task: Task,
    weights: Tree,
    samples: Samples,
    counts: torch.Tensor,
    batch_size: int,
) -> Tree:
    """Measure the same weights on the samples of several clients, in common batches.

    Args:
        measure: The metrics.
        task: The task, with its model.
        weights: Parameters by name.
        samples: The samples of one client after another.
        counts: Samples of each client, int64 [K].
        batch_size: Samples of a forward pass.

    Returns:
        The values that clients send, float64 [K, q] by name.
    """
    count = len(counts)
    whose = RowOwners(count, torch.arange(count).repeat_interleave(counts))
    state = state_of(task.model, weights, samples, measure, batch_size, whose)
    sums, alone = {n: t.cpu() for n, t in state.items() if "/" not in n}, scored(measure)
    each = measure.values(state, count) if alone else []
    values = {n: torch.tensor([v[n] for v in each]).double()[:, None] for n in alone}
    return sums | {OF_ONE + name: value for name, value in values.items()}


def sums_named(measure: Measure, when: Iterable[str]) -> list[str]:
    """List the names of the values that a client sends, for these points of a round."""
    sums = [count.name for count in measure.counts if count.sums]
    own = [*sums, *(OF_ONE + name for name in scored(measure))]
    return [point + name for point in when for name in own]


def values_of(
    measure: Measure, sent: Tree, when: str
) -> tuple[dict[str, Floats], dict[str, float]]:
    """Compute the metrics of each client, and of all samples together.

    Args:
        measure: The metrics.
        sent: The values that clients sent, [K, q] by name.
        when: Prefix of the names for one point of a round.

    Returns:
        By metric, the values of the clients in order, [K], and of all samples; NaN if undefined.
    """
    own = {n.removeprefix(when): t for n, t in sent.items()}
    state = {count.name: own[count.name] for count in measure.counts if count.sums}
    each = measure.values(state, len(next(iter(sent.values()))))
    whole = measure.values(measure.pooled(state))[0]
    found = {n: np.array([v[n] for v in each], np.float64) for n in measure.metrics}
    return found | {n: own[OF_ONE + n][:, 0].numpy() for n in scored(measure)}, whole


def usual(layouts: Sequence[Layout]) -> Layout:
    """Return the layout that most clients have sent, the first one among equals."""
    return Counter(layouts).most_common(1)[0][0]


def spread(
    metric: str, values: Floats, pooled: float, lower: Collection[str] = ()
) -> dict[str, float]:
    """Describe the distribution of a metric over clients.

    Args:
        metric: Its name, which determines the direction.
        values: Value of each client, [K]; clients with NaN are left out.
        pooled: Value over all samples; NaN: unknown.
        lower: As for `higher_is_better`.

    Returns:
        ``mean`` and ``std`` over clients with equal weights (``std`` of a whole population);
        ``pooled``; interpolated percentiles; ``worst10`` and ``best10``, the means over the worst
        and the best tenth, of ceil(K / 10) clients. NaN without clients. ``n``: the number of
        clients, if some are left out.

    Example:
        >>> found = spread("accuracy", np.array([0.2, 0.4, 0.9]), 0.6)
        >>> found["worst10"], found["best10"], round(found["mean"], 3), found["median"]
        (0.2, 0.9, 0.5, 0.4)
    """
    known = np.sort(values[np.isfinite(values)])
    if not len(known):
        known = np.array([math.nan])
    tenth = math.ceil(len(known) / 10)
    low, high = float(known[:tenth].mean()), float(known[-tenth:].mean())
    worst, best = (low, high) if higher_is_better(metric, lower) else (high, low)
    p10, median, p90 = map(float, np.quantile(known, [0.1, 0.5, 0.9]))
    return {
        "mean": float(known.mean()),
        "pooled": pooled,
        "std": float(known.std()),
        "min": float(known[0]),
        "p10": p10,
        "median": median,
        "p90": p90,
        "max": float(known[-1]),
        "worst10": worst,
        "best10": best,
    } | ({} if np.isfinite(values).all() else {"n": int(np.isfinite(values).sum())})


Words = npt.NDArray[np.uint32]
PIECES, BITS, POINT = 8, 16, 40  # of a number: pieces, bits of each, bits behind the point
MOST_CLIENTS = 2**BITS  # whose pieces do not run over
LARGEST = 2.0 ** (PIECES * BITS - POINT - 1 - BITS)  # of a number of one client
WHOLE = 2 ** (PIECES * BITS)
SHIFTS = np.arange(0, PIECES * BITS, BITS).astype(object)
BINS = 512  # of m / (1 + |m|), from -1 to 1: of accuracies 0.004 to 0.016 wide
_PLACES = np.maximum(np.arange(BINS), 0.5) / (BINS / 2) - 1
BEGINS = _PLACES / (1 - abs(_PLACES))  # the m where each place of a histogram begins


@dataclass(frozen=True)
class SummedMeasure:
    """Encode and decode a run's metrics as integer vectors for secure aggregation.

    Attributes:
        measure: The metrics.
        layout: Layout of the sums that a client sends for a point of a round.
        points: Prefix of the names of each point.
    """

    measure: Measure
    layout: Layout
    points: tuple[str, ...]

    @property
    def _sums(self) -> Layout:
        named = self.layout.shapes
        return Layout(tuple(pair for pair in named if not pair[0].startswith(OF_ONE)))

    @property
    def _numbers(self) -> int:
        return 2 + len(self.points) * (self._sums.size + 3 * len(self.measure.metrics))

    @property
    def size(self) -> int:
        """Return the number of words in a vector."""
        bins = len(self.points) * len(self.measure.metrics) * BINS
        return PIECES * self._numbers + bins

    def words(self, sent: Tree, samples: torch.Tensor) -> Words:
        """Encode the values of clients as words.

        Args:
            sent: [K, q] by name, of all points.
            samples: Samples measured by each client, int64 [K]; 0 if it has none, and its values in
                ``sent`` are ignored.

        Returns:
            Words [K, size].

        Raises:
            ClientError: If a sum is not finite, or too large.
        """
        has = (samples > 0).numpy()
        columns: list[Floats] = [has.astype(np.float64), samples.double().numpy()]
        bins: list[Words] = []
        for point in self.points:
            own = {n: t for n, t in sent.items() if n.startswith(AFTER) == bool(point)}
            columns += [t for n, _ in self._sums.shapes for t in own[point + n].double().numpy().T]
            for value in values_of(self.measure, own, point)[0].values():
                known = has & np.isfinite(value)
                m = np.where(known, value, 0.0)
                columns += [known.astype(np.float64), m, m * m]
                places = np.clip((m / (1 + abs(m)) + 1) * (BINS / 2), 0, BINS - 1).astype(np.int64)
                bins.append((np.arange(BINS) == places[:, None]) & known[:, None])
        numbers = np.stack(columns, axis=1) * has[:, None]
        if not np.all(abs(numbers) < LARGEST):
            raise ClientError("what it measured has a NaN, an infinity or too large a number")
        whole = np.frompyfunc(lambda x: round(x * 2**POINT), 1, 1)(numbers).astype(object)
        pieces = ((whole[:, :, None] >> SHIFTS) % 2**BITS).reshape(len(has), -1)
        return np.concatenate([pieces.astype(np.uint32), *bins], axis=1, dtype=np.uint32)

    def row(self, total: Words, clients: int, least: int) -> dict[str, object]:
        """Describe the metrics over clients, from the sum of their vectors.

        Args:
            total: Words [size].
            clients: Number of clients in the sum.
            least: Fewest clients with a value for a metric to be published, and fewest clients that
                measured for anything to be published.

        Returns:
            Results of `spread` by metric; ``n``, the clients that measured; and their samples.
            Unpublished metrics are missing, and ``withheld`` says why.

        Raises:
            WireError: If this number of clients cannot have sent it.
        """
        pieces, bins = np.split(total, [PIECES * self._numbers])
        whole = (pieces.astype(object).reshape(-1, PIECES) << SHIFTS).sum(axis=1)
        signed = (whole + WHOLE // 2) % WHOLE - WHOLE // 2
        numbers = signed.astype(np.float64) / 2**POINT
        n, samples = numbers[:2].tolist()
        few = list[str]()
        own, row = iter(numbers[2:].reshape(len(self.points), -1)), dict[str, object]()
        counts = iter(bins.astype(np.int64).reshape(-1, BINS))
        for point in self.points:
            sums, moments = np.split(next(own), [self._sums.size])
            state = self._sums.unpack(torch.from_numpy(sums[None]))
            pooled = self.measure.values(state)[0]
            for metric, told in zip(pooled, moments.reshape(-1, 3).tolist(), strict=True):
                (known, first, second), histogram = told, next(counts)
                if not (known == histogram.sum() and 0 <= known <= n <= clients):
                    raise WireError(
                        f"{known:g} of {clients} clients have {metric}, {n:g} have samples, "
                        f"and the histogram has {histogram.sum()}: some client broke the "
                        "protocol"
                    )
                if known < least:
                    few.append(point + metric)
                    continue
                mean = first / known
                std = math.sqrt(max(0.0, second / known - mean * mean))
                lower, values = self.measure.lower, np.repeat(BEGINS, histogram)
                found = spread(metric, values, pooled[metric], lower)
                found |= {"mean": mean, "std": std} | ({"n": known} if known < n else {})
                row[point + metric] = found
        if n < least:
            return {"withheld": FEW.format(least)}
        if few:
            row["withheld"] = f"{FEW.format(least)} of {', '.join(few)}"
        return row | {"n": int(n), "samples": int(samples)}


def read_sizes(told: object) -> Layout:
    """Parse a layout that a client sends beside its vector.

    Raises:
        WireError: If it is no valid layout.
    """
    pairs = told.items() if isinstance(told, Mapping) else [("", 0)]
    if not all(isinstance(size, int) and 0 < size < 2**20 for _, size in pairs):
        raise WireError(f"{str(told)[:50]!r} is no layout of sums")
    return Layout(tuple((str(name), (size,)) for name, size in pairs))


def write_sizes(layout: Layout) -> Mapping[str, int]:
    """Write a layout for `read_sizes`."""
    return {name: size for (name, _), size in zip(layout.shapes, layout.sizes, strict=True)}
