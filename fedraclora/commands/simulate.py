"""``fedraclora simulate``: run one federated training in this process, or a sweep (-m)."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from fedraclora.binding import Plain, PlainDict, section
from fedraclora.commands.run_files import ROUNDING_ERRORS
from fedraclora.commands.status import composing, report_error
from fedraclora.commands.watch import watched
from fedraclora.compose import CONF
from fedraclora.compose.overrides import (
    flags_first,
    in_plain_words,
    key_of,
    plain_of,
    without_idle,
)
from fedraclora.compose.resume import explaining_resume, is_done
from fedraclora.config.run_config import from_plain
from fedraclora.launch import choose, run_shown
from fedraclora.protocol.uplinks import calmer
from fedraclora.run.folder import read_summary
from fedraclora.run.ledger import headline, metrics_of, number
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.terminal.progress import console_for_tables, size

LONGEST = 255  # bytes of a file name that file systems allow

FAILED: list[str] = []
SHOWS = ("--cfg", "-c", "--info", "-i", "--hydra-help")  # Hydra's flags that only print


def rows_of_nodes(summary: PlainDict) -> Iterator[tuple[str, str]]:
    """Yield what a deployment sent to each node and got, and which clients it missed how often."""
    moved, missed = summary.get("transport"), summary.get("missed")
    for node, ways in moved.items() if isinstance(moved, dict) else ():
        told = ", ".join(f"{way} {size(int(count))}" for way, count in sorted(ways.items()))
        yield "node", f"{node}: {told}"
    for client, rounds in missed.items() if isinstance(missed, dict) else ():
        yield "missing", f"client {client} in {rounds} of {summary['rounds']} rounds"


def print_outcome(summary: PlainDict, folder: Path, plain: Plain) -> None:
    """Print the results of a run as a table."""
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")  # so that the folder can be copied
    metrics = summary["metrics"]
    if isinstance(metrics, dict):
        for name, value in metrics.items():
            table.add_row(f"final {name}", "not finite" if value is None else f"{value:.4f}")
        if metrics.get("loss", 0.0) is None:
            advice = calmer(own=section(plain, "local").get("train") is not None)
            table.add_row("diverged", f"{advice}; it cannot be resumed as it is")
    for name, value_of_clients in metrics_of({"clients": summary.get("by_clients")}).items():
        if name.endswith((".mean", ".std", ".worst10")):
            table.add_row(
                name, "not finite" if value_of_clients is None else f"{value_of_clients:.4f}"
            )
    table.add_row("rounds", str(summary["rounds"]))
    table.add_row("clients", f"{summary['clients']}, {summary['cohort']} a round")
    table.add_row("uplink", f"{summary['uplink_floats']} numbers a client and round")
    table.add_row("uplink in all", size(number(summary, "uplink_total")))
    catchup = f", {size(number(summary, 'catchup_total'))} of it catch-up"
    table.add_row("downlink in all", size(number(summary, "downlink_total")) + catchup)
    for title, key in ROUNDING_ERRORS.items():
        if key in summary:
            table.add_row(title, f"{number(summary, key):.3g} of what was rounded")
    if "asked" in summary:
        dropped = f"{summary['dropped']} of {summary['asked']} times that a client was asked"
        table.add_row("dropped", dropped)
    for title, text in rows_of_nodes(summary):
        table.add_row(title, text)
    for key, protected in (("privacy", "clients"), ("sample_privacy", "samples")):
        if key in summary:
            epsilon, delta = (number(summary, key, part) for part in ("epsilon", "delta"))
            text = f"epsilon {epsilon:.3f} at delta {delta:g}, of {protected}"
            table.add_row(
                "privacy",
                text if math.isfinite(epsilon) else f"none: {protected} are clipped, without noise",
            )
    if "virtual_seconds" in summary:
        table.add_row("virtual seconds", f"{number(summary, 'virtual_seconds'):.1f}")
    table.add_row("seconds in all", f"{summary['seconds']}")
    names = ("curves.png", "partition.png", "ledger.jsonl")
    written = ", ".join(name for name in names if (folder / name).is_file())
    table.add_row("written to", f"{folder} ({written})")
    console_for_tables().print(table)


def sweep_name(overrides: Sequence[str]) -> str:
    """Name the folder of a sweep's job by its overrides, sorted.

    Example:
        >>> sweep_name(["seed=1", "output.dir=out", "rounds=5"])
        'rounds=5,seed=1'
    """
    naming = sorted(o for o in overrides if not o.startswith(("output.", "resume=", "output=")))
    name = ",".join(naming).replace("/", "_") or "run"
    if len(os.fsencode(name)) <= LONGEST:
        return name
    # The digest keeps truncated names unique.
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    room = LONGEST - len(digest) - 1
    return f"{os.fsencode(name)[:room].decode(errors='ignore')}_{digest}"


def run_one(plain: PlainDict, typed: list[str], sweep_job: str | None) -> PlainDict:
    """Run, resume, or skip one run; print and return its summary."""
    plain, folder, resume = choose(plain, typed, sweep_job)
    if resume and is_done(folder, plain):
        print(f"{folder} is finished already")
        return read_summary(folder)
    sweep = sweep_job is not None
    with watched(folder, sweep=sweep), explaining_resume(folder, "simulate"):
        config = from_plain(plain, METHODS, resuming=resume)
        summary = run_shown(RunBuilder(config, folder, resume=resume)).summary
    print_outcome(summary, folder, plain)
    return summary


def main(words: Sequence[str]) -> int:
    """Run one run or a sweep; the exit status is 1 if any of them failed."""
    FAILED.clear()
    with composing():
        by_hydra(words)
    return 1 if FAILED else 0


def by_hydra(words: Sequence[str]) -> None:
    """Let Hydra compose the arguments, and run the result."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra reports errors itself, in ways of its own
    sys.argv[1:] = flags_first(words)
    with in_plain_words(words):
        compose_and_run()


def shows_composed(words: Sequence[str]) -> bool:
    """Print the composed config if an argument asks for it (``--cfg job``)."""
    if not any(word.partition("=")[0] in SHOWS for word in words):
        return False
    by_hydra(words)
    return True


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def compose_and_run(cfg: DictConfig) -> float | None:
    """Run the config that Hydra composed, and return its primary metric for Hydra's sweepers."""
    job = HydraConfig.get()
    words = list(map(str, OmegaConf.to_container(job.overrides.task, resolve=False) or ()))
    sweep = sweep_name(words) if job.mode == RunMode.MULTIRUN else None

    def recompose(words: Sequence[str]) -> PlainDict:
        return plain_of(compose("config", [*job.overrides.hydra, *words]), job.runtime.choices)

    try:
        plain = without_idle(plain_of(cfg, job.runtime.choices), words, recompose)
        summary = run_one(plain, [key_of(word) for word in words], sweep)
    except Exception as error:  # the other jobs of a sweep still run
        report_error(error)
        FAILED.append(sweep or "run")
        return None
    name = headline([summary])
    return None if name is None else number(summary, "metrics", name)
