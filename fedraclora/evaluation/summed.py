"""What clients measured as vectors of whole numbers, of whose sum the server makes a row.

Under secure sums it sees no client's own numbers. A client sends the sums of which metrics are
made; of each metric m a one, m and m squared, or zeros where it is not defined; and a one in the
place of a histogram into which its m falls. Numbers have 128 bits, 40 of them behind the point, in
pieces of 16, whose sums fit into 32-bit words. So mean and deviation over clients are those of the
open sums but for 2^-40 a client; percentiles are of the histogram, below the true ones by less than
a place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.errors import ClientError, WireError
from fedraclora.evaluation.clients import AFTER, OF_ONE, ClientMeasure, Values, spread
from fedraclora.tree import Layout, Tree

_Words = npt.NDArray[np.uint32]
PIECES, BITS, POINT = 8, 16, 40  # of a number: pieces, bits of each, bits behind the point
MOST_CLIENTS = 2**BITS  # whose pieces do not run over
LARGEST = 2.0 ** (PIECES * BITS - POINT - 1 - BITS)  # of a number of one client
BINS = 512  # of m / (1 + |m|), from -1 to 1: of accuracies 0.004 to 0.016 wide


@dataclass(frozen=True)
class SummedMeasure:
    """The vectors of a run.

    Attributes:
        measure: The metrics.
        layout: Of the sums that a client sends of a point of a round.
        points: What is before the names of each point.
    """

    measure: ClientMeasure
    layout: Layout
    points: tuple[str, ...]

    @property
    def _metrics(self) -> list[str]:
        return [*self.measure.measure.metrics]

    @property
    def _sums(self) -> list[tuple[str, int]]:
        shapes = zip(self.layout.shapes, self.layout.sizes, strict=True)
        return [(name, size) for (name, _), size in shapes if not name.startswith(OF_ONE)]

    @property
    def _numbers(self) -> int:
        each = sum(size for _, size in self._sums) + 3 * len(self._metrics)
        return 2 + len(self.points) * each

    @property
    def size(self) -> int:
        """_Words of a vector."""
        return PIECES * self._numbers + len(self.points) * len(self._metrics) * BINS

    def words(self, sent: Tree, samples: torch.Tensor) -> _Words:
        """Write what clients send.

        Args:
            sent: [K, q] by name, of all points.
            samples: That they measured on, int64 [K]; 0 for one that has none, whose numbers in
                ``sent`` are not read.

        Returns:
            _Words [K, size].

        Raises:
            ClientError: If a sum is not finite, or too large.
        """
        has = (samples > 0).numpy()
        columns: list[Values] = [has.astype(np.float64), samples.double().numpy()]
        bins: list[_Words] = []
        for point in self.points:
            own = {n: t for n, t in sent.items() if n.startswith(AFTER) == bool(point)}
            columns += [t for n, _ in self._sums for t in own[point + n].double().numpy().T]
            for value in self.measure.values(own, point)[0].values():
                known = has & np.isfinite(value)
                m = np.where(known, value, 0.0)
                columns += [known.astype(np.float64), m, m * m]
                places = np.clip((m / (1 + abs(m)) + 1) * (BINS / 2), 0, BINS - 1).astype(np.int64)
                bins.append((np.arange(BINS) == places[:, None]) & known[:, None])
        numbers = np.stack(columns, axis=1) * has[:, None]
        if not np.all(abs(numbers) < LARGEST):
            raise ClientError("what it measured has a NaN, an infinity or too large a number")
        pieces = self._pieces(numbers)
        return np.concatenate([pieces, *bins], axis=1).astype(np.uint32)

    @staticmethod
    def _pieces(numbers: Values) -> _Words:
        whole = np.frompyfunc(lambda x: round(x * 2**POINT), 1, 1)(numbers).astype(object)
        parts = (whole[:, :, None] >> np.arange(0, PIECES * BITS, BITS).astype(object)) % 2**BITS
        found: _Words = parts.reshape(len(numbers), -1).astype(np.uint32)
        return found

    def row(self, total: _Words, clients: int) -> dict[str, object]:
        """Describe the metrics over clients, from the sum of their vectors.

        Args:
            total: _Words [size].
            clients: Who are in the sum.

        Returns:
            By metric what `spread` gives; how many measured (``n``), and on how many samples.

        Raises:
            WireError: If so many clients cannot have sent it.
        """
        cut = PIECES * self._numbers
        parts = total[:cut].astype(object).reshape(-1, PIECES)
        whole = (parts << np.arange(0, PIECES * BITS, BITS).astype(object)).sum(axis=1)
        top = 2 ** (PIECES * BITS)
        numbers = [float(x - top if x >= top // 2 else x) / 2**POINT for x in whole % top]
        found, n, samples = iter(numbers), *numbers[:2]
        next(found), next(found)
        counts, row = iter(total[cut:].astype(np.int64).reshape(-1, BINS)), dict[str, object]()
        for point in self.points:
            state = {
                name: torch.tensor([[next(found) for _ in range(size)]], dtype=torch.float64)
                for name, size in self._sums
            }
            pooled = self.measure.measure.values(state)[0]
            for metric in self._metrics:
                known, first, second = next(found), next(found), next(found)
                histogram = next(counts)
                if not (known == histogram.sum() and 0 <= known <= n <= clients):
                    raise WireError(
                        f"{known:g} of {clients} clients have {metric}, {n:g} have samples, and "
                        f"the histogram has {histogram.sum()}: some client sent what it may not"
                    )
                row[point + metric] = self._described(
                    metric, histogram, pooled[metric], (known, first, second)
                )
        return row | {"n": int(n), "samples": int(samples)}

    @staticmethod
    def _described(
        metric: str, histogram: npt.NDArray[np.int64], pooled: float, sums: Iterable[float]
    ) -> dict[str, float]:
        known, first, second = sums
        place = np.maximum(np.arange(BINS), 0.5) / (BINS / 2) - 1  # where each begins
        values = np.repeat(place / (1 - abs(place)), histogram)
        mean = first / known if known else math.nan
        std = math.sqrt(max(0.0, second / known - mean * mean)) if known else math.nan
        return spread(metric, values, pooled) | {"mean": mean, "std": std}


def read_sizes(told: object) -> Layout:
    """Read a layout that a client tells beside its vector.

    Raises:
        WireError: If it is none.
    """
    try:
        pairs = [(str(name), int(size)) for name, size in told.items()]  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError) as error:
        raise WireError(f"{str(told)[:50]!r} is no layout of sums") from error
    if not all(0 < size < 2**20 for _, size in pairs):
        raise WireError(f"{str(told)[:50]!r} is no layout of sums")
    return Layout(tuple((name, (size,)) for name, size in pairs))


def write_sizes(layout: Layout) -> Mapping[str, int]:
    """Write a layout as `read_sizes` reads it."""
    return {name: size for (name, _), size in zip(layout.shapes, layout.sizes, strict=True)}
