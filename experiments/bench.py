"""``fedraclora bench``: whole rounds of the engines against the physical limit, in one run.

"Central" is that limit: one model with one low-rank adapter, the same ranks, trained on the same
samples in as many steps. Rounds of all rows are interleaved, so that a busy machine slows all of
them; ratios of medians are what counts. Keys: ``device=``, ``rounds=``, ``clients=``, ``size=``
(small, mlp, transformer, all), ``out=`` (a JSON file), ``check=true`` (fail beyond the bounds).
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from experiments.assemble import fix_bits
from experiments.central import central_round
from experiments.folders import git_revision
from experiments.workloads import WORKLOADS, Workload, make_runner
from fedraclora.build import pick_device
from fedraclora.errors import ConfigError, FedRacLoraError, unknown
from fedraclora.schema import build

BOUNDS = {  # (workload, figure): the largest value that is allowed, or the least for "faster"
    ("mlp", "vectorised / central"): 1.15,
    ("transformer", "vectorised / central"): 1.15,
    ("small", "inline / vectorised"): 10.0,
    ("small", "fixed ms"): 3.0,
}
Figures = dict[str, float]


@dataclass(frozen=True)
class BenchConfig:
    """What to time."""

    device: str = "auto"
    size: str = "all"
    rounds: int = 7
    clients: int = 100
    threads: int = 1
    out: str | None = None
    check: bool = False

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.size not in {*WORKLOADS, "all"}:
            raise unknown("size", self.size, [*WORKLOADS, "all"])
        if min(self.rounds, self.clients, self.threads) < 1:
            raise ConfigError("rounds, clients and threads must be 1 or more")


def parse(words: list[str]) -> BenchConfig:
    """Read ``key=value`` words."""
    group: dict[str, object] = {}
    for word in words:
        key, mark, text = word.partition("=")
        if not mark:
            raise ConfigError(f"{word!r} is not of the form key=value")
        low = text.lower()
        group[key] = (
            int(text) if text.isdecimal() else low == "true" if low in {"true", "false"} else text
        )
    return build("bench", BenchConfig, group)


def interleaved(rows: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each row ``rounds`` times, in turn, after one round that does not count.

    Returns:
        Seconds of each counted round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for round_ in range(rounds + 1):
        for name, run in rows.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def measure(workload: Workload, config: BenchConfig, device: torch.device) -> Figures:
    """Time one workload.

    Returns:
        Median seconds of each row, ratios of medians, and the fixed cost of a round in ms.
    """
    task = workload.task(config.clients, device)
    vectorised = make_runner(workload, task, device)
    chunk = vectorised.strategy.loop.chunk
    idle = make_runner(replace(workload, steps=0), task, device)
    rows: dict[str, Callable[[], object]] = {
        "vectorised": vectorised.round,
        "central": lambda: central_round(workload, task, config.clients),
        "central in parts": lambda: central_round(workload, task, chunk),
        "idle": idle.round,
    }
    if workload.inline:
        rows["inline"] = make_runner(workload, task, device, chunk=1).round
    seconds = interleaved(rows, config.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    limit = min(medians["central"], medians.pop("central in parts"))
    figures = {name: medians[name] for name in medians if name not in {"idle", "central"}}
    figures |= {"central": limit, "chunk": float(chunk), "fixed ms": 1e3 * medians["idle"]}
    figures["vectorised / central"] = medians["vectorised"] / limit
    if "inline" in medians:
        figures["inline / vectorised"] = medians["inline"] / medians["vectorised"]
    return figures


def failures(found: dict[str, Figures]) -> list[str]:
    """Say which figures lie beyond their bounds."""
    lines = []
    for (workload, name), bound in BOUNDS.items():
        value = found.get(workload, {}).get(name)
        if value is None:
            continue
        good = value >= bound if name == "inline / vectorised" else value <= bound
        if not good:
            lines.append(f"{workload}: {name} is {value:.3g}, bound {bound:g}")
    return lines


def show(found: dict[str, Figures]) -> None:
    """Print the table."""
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    table = Table(title="seconds per round (medians)")
    table.add_column("workload")
    for name in names:
        table.add_column(name, justify="right")
    for workload, figures in found.items():
        cells = [f"{figures[n]:.4g}" if n in figures else "-" for n in names]
        table.add_row(workload, *cells)
    Console().print(table)


def main() -> int:
    """Time the workloads; status 1 if ``check=true`` and a bound is broken, or for bad input."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    try:
        config = parse(sys.argv[1:])
    except FedRacLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    fix_bits(config.threads)
    device = pick_device(config.device)
    chosen = WORKLOADS if config.size == "all" else {config.size: WORKLOADS[config.size]}
    found = {name: measure(workload, config, device) for name, workload in chosen.items()}
    show(found)
    if config.out is not None:
        card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
        packages = ("torch", "flwr", "numpy")
        report = {
            "figures": found,
            "device": device.type,
            "processor": card or platform.machine(),
            "threads": config.threads,
            "clients": config.clients,
            "rounds": config.rounds,
            "numpy": np.__version__,
            "versions": {p: version(p) for p in packages},
            "git": git_revision(),
        }
        Path(config.out).write_text(json.dumps(report, indent=1) + "\n")
    broken = failures(found) if config.check else []
    for line in broken:
        print(f"error: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
