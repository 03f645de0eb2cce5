"""``fedraclora bench``: whole rounds of every engine, of central training and of the peers.

Rows of ours are timed in turn in this process, so that a busy machine slows all of them; then
each peer that is installed (`make bench-peers`) does the same work in a process of its own. Keys:

  size=     A, B, C, minilm, texts, llama, smollm2, cohort, population, rounds, several with
            commas (a process each), or all
  rows=     names of rows, with commas, or all
  rounds=   counted rounds of each row, instead of the workload's own number
  device=   auto, cpu or cuda
  out=      a folder: one JSON file per workload
  check=true    fail when a ratio leaves its bound
  profile=true  say where the time of a round goes, instead
  table=    a folder of JSON files: print its tables in Markdown, instead
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedraclora.config.build import fix_bits, pick_device
from fedraclora.errors import ConfigError, EngineError, FedRacLoraError
from fedraclora.experiments.bench.bounds import disagreements, judge
from fedraclora.experiments.bench.capacity import largest_chunk
from fedraclora.experiments.bench.config import BenchConfig, parse
from fedraclora.experiments.bench.launch import interpreter, run_peer
from fedraclora.experiments.bench.phases import profile
from fedraclora.experiments.bench.report import Report, about
from fedraclora.experiments.bench.rows import BUILDERS, hosted, peak_alone
from fedraclora.experiments.bench.table import table, tables
from fedraclora.experiments.bench.timing import Figures, figures, interleaved, training_loss
from fedraclora.experiments.bench.usage import PROC
from fedraclora.experiments.bench.workloads import PEERS, RAY, WORKLOADS, Case
from fedraclora.experiments.status import reported
from fedraclora.training.precision import BF16_MIXED, FLOAT32
from fedraclora.tree import Tree

NOT_INSTALLED = "not installed; `make bench-peers` installs the peers"
PRECISION_OF = {"vectorised": FLOAT32, "bf16": BF16_MIXED}


@reported
def main() -> int:
    """Time the workloads; status 1 for a broken bound under ``check=true`` and for bad input."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    return run(parse(sys.argv[1:]))


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
    command = [sys.executable, "-m", "fedraclora.experiments.bench", *config.words]
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
    lines = judge(report.workload, report.rows, str(report.about["device"]))
    for fate in ("kept", "open"):
        for line in lines[fate]:
            print(f"{fate}: {line}")
    return lines["broken"]


def show(report: Report) -> None:
    """Print the table of one workload, and what is missing in it."""
    print(table(report).markdown())
    for name, why in report.missing.items():
        print(f"missing: {name}: {why}")
