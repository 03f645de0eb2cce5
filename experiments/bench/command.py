"""``fedraclora bench``: whole rounds of every engine, of central training and of the peers.

Rows of ours are timed in turn in this process, so that a busy machine slows all of them; then
each peer that is installed (`make bench-peers`) does the same work in a process of its own. Keys:

  size=     A, B, C, minilm, texts, llama, smollm2, cohort, bits, population, rounds, several
            with commas (a process each), or all
  rows=     names of rows, with commas, or all
  rounds=   counted rounds of each row, instead of the workload's own number
  device=   auto, cpu or cuda
  out=      a folder: one JSON file per workload
  check=true    fail when a ratio leaves its bound
  profile=true  say where the time of a round goes, instead
  table=    a folder of JSON files: print its tables in Markdown, instead
"""

from __future__ import annotations

import cProfile
import pstats
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Annotated

import torch
from typing_extensions import override

from fedraclora.binding import build
from fedraclora.clients.worker import answer_of
from fedraclora.compose.words import key_values
from fedraclora.config.build import fix_bits, pick_device
from fedraclora.config.run_config import DEVICES
from fedraclora.data.clients import PartitionedData
from fedraclora.data.task import cross_entropy, cross_entropy_slope, forward
from fedraclora.errors import ConfigError, EngineError, FedRacLoraError, unknown
from fedraclora.experiments.bench.launch import interpreter, run_peer
from fedraclora.experiments.bench.rows import BUILDERS, hosted, peak_alone
from fedraclora.experiments.bench.runs import federated_row, opened, trainer_maker
from fedraclora.experiments.bench.table import (
    Report,
    about,
    disagreements,
    judge_rows,
    table,
    tables,
)
from fedraclora.experiments.bench.timing import Figures, figures, interleaved, training_loss
from fedraclora.experiments.bench.usage import PROC, Laps
from fedraclora.experiments.bench.workloads import PEERS, RAY, WORKLOADS, Case
from fedraclora.limits import Count, Limited, OneOf
from fedraclora.protocol.link import apply_link
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.ledger import Ledger
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.feedforward import FeedForward
from fedraclora.training.materialize import materialize
from fedraclora.training.memory import is_out_of_memory
from fedraclora.training.optimizer import CohortOptimizer
from fedraclora.training.precision import BF16_MIXED, FLOAT32
from fedraclora.training.schedule import Schedule
from fedraclora.tree import Tree

NOT_INSTALLED = "not installed; `make bench-peers` installs the peers"
PRECISION_OF = {"vectorized": FLOAT32, "bf16": BF16_MIXED}


def main(words: Sequence[str]) -> int:
    """Time the workloads; status 1 for a broken bound under ``check=true``."""
    return run(parse(words))


def run(config: BenchConfig) -> int:
    """Do what the words ask for; the exit status."""
    if config.table is not None:
        print(tables(Path(config.table)), end="")
        return 0
    if not PROC.exists():
        raise ConfigError("CPU time and memory of processes are read from /proc: run it on Linux")
    device = pick_device(config.device)
    fix_bits(config.threads, device)
    if len(config.sizes) > 1:
        return max(apart(replace(config, size=name)) for name in config.sizes)
    (name,) = config.sizes
    case = Case(WORKLOADS[name], device)
    if config.profile:
        print(f"{name}: {profile(case)}")
        return 0
    report = measure(name, case, config)
    show(report)
    if config.out is not None:
        report.write(Path(config.out))
    wrong = disagreements(report.rows) + (judged(report) if config.check else [])
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


def apart(config: BenchConfig) -> int:
    """Time one workload in a process of its own, which holds no memory of another; its status."""
    command = [sys.executable, "-m", "fedraclora.commands.cli", "bench", *config.words]
    return abs(subprocess.run(command, check=False).returncode)  # noqa: S603  this program


def measure(name: str, case: Case, config: BenchConfig) -> Report:
    """Time the rows of one workload: ours in turn, then the peers one by one."""
    workload = case.workload
    report = Report(name, about=about(case.device, config.threads))
    rounds = workload.rounds if config.rounds is None else config.rounds
    chosen = [row for row in workload.rows if config.wants(row)]
    here = [row for row in chosen if row in BUILDERS and row not in RAY]
    # First: what this process holds by then would lie in theirs.
    alone = here if workload.apart and case.device.type == "cpu" else []
    peaks = {row: peak_alone(row, workload) for row in alone}
    loss = partial(training_loss, case.task)
    report.about |= {"tokens": case.tokens} if workload.apart else {}
    for group in (here, [row for row in chosen if row in RAY]):
        try:
            report.rows |= timed(group, case, rounds, loss)
        except EngineError as error:
            report.missing |= dict.fromkeys(group, str(error))
    for row, peak in peaks.items():
        report.rows[row]["peak_bytes"] = peak
    if case.device.type == "cuda":
        for row, precision in PRECISION_OF.items():
            if row in report.rows:
                report.rows[row]["largest_chunk"] = largest_chunk(case, precision)
    for peer in (row for row in chosen if row in PEERS):
        python = interpreter(Path(config.peers), peer)
        if case.device.type != "cpu" or python is None:
            report.missing[peer] = "peers are timed on the CPU only" if python else NOT_INSTALLED
            continue
        try:
            ran, weights = run_peer(peer, python, workload, case.task, rounds + 1, config.threads)
        except FedRacLoraError as error:
            report.missing[peer] = str(error)
            continue
        facts = {"versions": ran["versions"]}
        report.rows[peer] = figures(ran["wall"], ran["cpu"], ran["peak"], loss(weights), facts)
    return report


def timed(
    names: Sequence[str], case: Case, rounds: int, loss: Callable[[Tree], float]
) -> dict[str, Figures]:
    """Build rows, time them in turn, and end what they started."""
    with ExitStack() as stack:
        stack.enter_context(hosted(names, case.device))
        rows = {}
        for name in names:
            rows[name] = BUILDERS[name](case)
            stack.callback(rows[name].close)
        return interleaved(rows, rounds, loss, case.device)


def judged(report: Report) -> list[str]:
    """Print how the bounds fare; give those that are broken."""
    lines = judge_rows(report.workload, report.rows, str(report.about["device"]))
    for fate in ("kept", "open"):
        for line in lines[fate]:
            print(f"{fate}: {line}")
    return lines["broken"]


def show(report: Report) -> None:
    """Print the table of one workload, and what is missing in it."""
    print(table(report).markdown())
    for name, why in report.missing.items():
        print(f"missing: {name}: {why}")


ROWS = tuple(dict.fromkeys(row for workload in WORKLOADS.values() for row in workload.rows))


@dataclass(frozen=True)
class BenchConfig(Limited):
    """What to time.

    Attributes:
        device: ``auto``, ``cpu`` or ``cuda``.
        size: A workload, several joined by commas, or ``all``.
        rows: Names of rows joined by commas, or ``all``.
        rounds: Counted rounds of each row; null: as the workload says.
        threads: Of torch, in each process.
        out: A folder; each workload writes one JSON file there.
        peers: The folder with one virtual environment per peer (``make bench-peers``).
        check: Fail when a ratio leaves its bound.
        profile: Say where the time of a round goes, instead.
        table: Print the tables of a folder of JSON files, instead.
    """

    device: Annotated[str, OneOf(DEVICES)] = "auto"
    size: str = "all"
    rows: str = "all"
    rounds: Count | None = None
    threads: Count = 1
    out: str | None = None
    peers: str = ".venv-peers"
    check: bool = False
    profile: bool = False
    table: str | None = None

    @override
    def __post_init__(self) -> None:
        """Reject impossible settings."""
        super().__post_init__()
        for size in self.sizes:
            if size not in WORKLOADS:
                raise unknown("size", size, [*WORKLOADS, "all"])
        for row in () if self.rows == "all" else self.rows.split(","):
            if row not in ROWS:
                raise unknown("rows", row, [*ROWS, "all"])

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the chosen workloads."""
        return tuple(WORKLOADS) if self.size == "all" else tuple(self.size.split(","))

    @property
    def words(self) -> list[str]:
        """The words that `parse` reads this from."""
        return [f"{key}={value}" for key, value in vars(self).items() if value is not None]

    def wants(self, row: str) -> bool:
        """Return whether a row is asked for."""
        return self.rows == "all" or row in self.rows.split(",")


def parse(words: Sequence[str]) -> BenchConfig:
    """Read ``key=value`` words.

    Raises:
        ConfigError: If a word or a value is wrong, naming it.
    """
    return build("bench", BenchConfig, key_values(words))


MOST = 1 << 20


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """Find the largest number that fits, to within an eighth: doubling, then halving the gap.

    Args:
        fits: Whether a number does; one that is larger than one that does not is not tried.
        most: The largest to try.

    Returns:
        The number; 0 if not even 1 fits.

    Example:
        >>> largest(lambda n: n <= 1000)
        960
    """
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    while bad <= most and bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def largest_chunk(case: Case, precision: str) -> int:
    """Train chunks of more and more clients of a workload until memory runs out."""
    method = FedRacLora(rank=case.workload.rank)
    trainer = trainer_maker(case, method, precision=precision)()
    state, downlink = opened(method, trainer, case.workload.cohort)

    def fits(clients: int) -> bool:
        ids = torch.arange(clients) % case.task.train.num_clients
        try:
            trainer.train(state.base, downlink, ids, round_=1, rate_scale=1.0)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            if case.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    return largest(fits)


# Inclusive times; a station below another, indented, is a part of it.
STATIONS: tuple[tuple[str, tuple[Callable[..., object], ...]], ...] = (
    ("round", (FedStrategy._attempt,)),  # noqa: SLF001
    ("  open", (FedRacLora.open_round,)),
    ("  ask", (Exchange.ask,)),
    ("  train", (CohortTrainer.train,)),
    ("    schedule", (Schedule.of,)),
    ("    sketch, start values", (materialize,)),
    ("    gather samples", (PartitionedData.gather,)),
    ("    forward", (FeedForward.forward, cross_entropy_slope, forward, cross_entropy)),
    ("    backward", (FeedForward.backward, torch.autograd.grad)),
    ("    optimizer", (CohortOptimizer.step,)),
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
