"""Where the time of a round goes, station by station."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType

import torch
from typing_extensions import override

from fedraclora.clients.worker import answer_of
from fedraclora.data.samples import Partitioned
from fedraclora.data.task import cross_entropy, cross_entropy_slope, forward
from fedraclora.experiments.bench.runs import federated_row
from fedraclora.experiments.bench.usage import Laps
from fedraclora.experiments.bench.workloads import Case
from fedraclora.protocol.link import apply_link
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.ledger import Ledger
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.fed_rac_lora import FedRacLora
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.feedforward import FeedForward
from fedraclora.training.materialise import materialise
from fedraclora.training.optimiser import CohortOptimiser
from fedraclora.training.schedule import Schedule

# Inclusive times; a station below another, indented, is a part of it.
STATIONS: tuple[tuple[str, tuple[Callable[..., object], ...]], ...] = (
    ("round", (FedStrategy._attempt,)),  # noqa: SLF001
    ("  open", (FedRacLora.open_round,)),
    ("  ask", (Exchange.ask,)),
    ("  train", (CohortTrainer.train,)),
    ("    schedule", (Schedule.of,)),
    ("    sketch, start values", (materialise,)),
    ("    gather samples", (Partitioned.gather,)),
    ("    forward", (FeedForward.forward, cross_entropy_slope, forward, cross_entropy)),
    ("    backward", (FeedForward.backward, torch.autograd.grad)),
    ("    optimiser", (CohortOptimiser.step,)),
    ("  answer", (answer_of,)),
    ("  collect", (Exchange.collect,)),
    ("  aggregate, merge", (FedRacLora.close_round,)),
    ("    mean", (Uplinks.mean,)),
    ("    merge", (apply_link,)),
    ("  ledger row", (Ledger.append,)),
)
LARGEST = 12
Entries = dict[tuple[str, int, str], tuple[int, int, float, float, object]]


@dataclass(frozen=True)
class Profile:
    """CPU time per round, inclusive.

    Attributes:
        free: Milliseconds of a round without the profiler, which slows small calls down.
        stations: Name, milliseconds under the profiler, calls.
        largest: The functions that take most by themselves: name, milliseconds, calls.
    """

    free: float
    stations: list[tuple[str, float, float]]
    largest: list[tuple[str, float, float]]

    @override
    def __str__(self) -> str:
        """Write one line per station."""
        lines = [f"{self.free:.2f} CPU ms a round; of a round under the profiler:"]
        for group in (self.stations, [], self.largest):
            lines += [f"{ms:10.3f} ms {calls:7.1f} calls  {name}" for name, ms, calls in group]
            lines += [] if group else ["the largest by themselves:"]
        return "\n".join(lines)


def profile(case: Case, seconds: float = 3.0) -> Profile:
    """Find where the rounds of the default engine spend their time.

    Args:
        case: A workload on a device.
        seconds: For how long, without the profiler and again with it.
    """
    row = federated_row(case)
    row.round(Laps(children=False))
    free, watched = Laps(children=False), Laps(children=False)
    profiler = cProfile.Profile(time.process_time)
    for laps, watch in ((free, False), (watched, True)):
        began = time.perf_counter()
        while time.perf_counter() < began + seconds or not laps.wall:
            if watch:
                profiler.enable()
            row.round(laps)
            profiler.disable()
    row.close()
    entries: Entries = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    each = 1e3 / len(watched.cpu)
    stations = []
    for name, functions in STATIONS:
        found = [entries[key] for key in map(place, functions) if key in entries]
        calls = sum(entry[1] for entry in found) * each / 1e3
        stations.append((name, sum(entry[3] for entry in found) * each, calls))
    largest = []
    for (file, line, function), entry in sorted(entries.items(), key=lambda e: -e[1][2])[:LARGEST]:
        where = function if file == "~" else f"{file.rpartition('/')[2]}:{line} {function}"
        largest.append((where, entry[2] * each, entry[1] * each / 1e3))
    return Profile(1e3 * sum(free.cpu) / len(free.cpu), stations, largest)


def place(function: Callable[..., object]) -> tuple[str, int, str]:
    """Name a function as the profiler does."""
    code: CodeType = function.__code__
    return code.co_filename, code.co_firstlineno, code.co_name
