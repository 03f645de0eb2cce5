"""``fedraclora simulate``: one federated run in this process (or a sweep of them with -m)."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from fedraclora.binding import Plain, PlainDict, section
from fedraclora.clients.engines import engine_of
from fedraclora.commands.run_files import ROUNDING_ERRORS
from fedraclora.commands.status import composing, tell
from fedraclora.compose import CONF
from fedraclora.compose.overrides import (
    flags_first,
    in_plain_words,
    key_of,
    plain_of,
    without_idle,
)
from fedraclora.compose.resume import go_on, is_done, told_how_to_go_on
from fedraclora.config.build import settled
from fedraclora.config.run_config import from_plain
from fedraclora.data.locate import user_path
from fedraclora.errors import ConfigError
from fedraclora.protocol.uplinks import calmer
from fedraclora.run.callback import Callback, method_label
from fedraclora.run.folder import read_summary, refuse_existing
from fedraclora.run.ledger import headline, metrics_of, number
from fedraclora.run.trusted import read_trusted
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.outcome import execute
from fedraclora.strategies.rate import settled_rate
from fedraclora.strategies.run import Run
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.strategies.start import settled_start
from fedraclora.terminal.progress import RunProgress, console_for_tables, size

STARTED = datetime.now()  # one stamp for all jobs of a sweep in this process
LONGEST = 255  # bytes of a name that file systems take

FAILED: list[str] = []
SHOWS = ("--cfg", "-c", "--info", "-i", "--hydra-help")  # flags of Hydra that print, and end


def carry_out(
    plain: PlainDict,
    folder: Path | None,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    steps: Sequence[RoundStep] = (),
) -> Run:
    """Run to the end in this process with a progress bar; see `strategies.outcome.execute`.

    Args:
        plain: The resolved config.
        folder: The run folder; None: the run leaves nothing behind.
        resume: Go on with the run in the folder.
        callbacks: What watches the rounds, or ends them early.
        steps: Those of a program's own, which the config names.

    Returns:
        The run.
    """
    config = from_plain(plain, METHODS, began=resume)
    label = method_label(plain)
    with RunProgress(config.rounds, shown=config.output.progress, label=label) as progress:
        watching = (progress, *callbacks)
        return execute(config, folder, engine_of, resume=resume, callbacks=watching, steps=steps)


def simulate(plain: PlainDict, folder: Path, *, resume: bool = False) -> PlainDict:
    """Run a simulation and return the summary of `carry_out`."""
    return carry_out(plain, folder, resume=resume).summary


def print_outcome(summary: PlainDict, folder: Path, plain: Plain) -> None:
    """Print the outcome of a run, whose config is ``plain``."""
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")  # the folder is to be copied
    metrics = summary["metrics"]
    if isinstance(metrics, dict):
        for name, value in metrics.items():
            table.add_row(f"final {name}", "not finite" if value is None else f"{value:.4f}")
        if metrics.get("loss", 0.0) is None:
            advice = calmer(own=section(plain, "local").get("train") is not None)
            table.add_row("diverged", f"{advice}; it cannot go on as it is")
    for name, told in metrics_of({"clients": summary.get("by_clients")}).items():
        if name.endswith((".mean", ".std", ".worst10")):
            table.add_row(name, "not finite" if told is None else f"{told:.4f}")
    table.add_row("rounds", str(summary["rounds"]))
    table.add_row("clients", f"{summary['clients']}, {summary['cohort']} a round")
    table.add_row("uplink", f"{summary['uplink_floats']} numbers a client and round")
    table.add_row("uplink in all", size(number(summary, "uplink_total")))
    caught = f", {size(number(summary, 'catchup_total'))} of it catch-up"
    table.add_row("downlink in all", size(number(summary, "downlink_total")) + caught)
    for title, key in ROUNDING_ERRORS.items():
        if key in summary:
            table.add_row(title, f"{number(summary, key):.3g} of what was rounded")
    if "asked" in summary:
        dropped = f"{summary['dropped']} of {summary['asked']} times that a client was asked"
        table.add_row("dropped", dropped)
    for key, whose in (("privacy", "clients"), ("sample_privacy", "samples")):
        if key in summary:
            cost, delta = (number(summary, key, part) for part in ("epsilon", "delta"))
            text = f"epsilon {cost:.3f} at delta {delta:g}, of {whose}"
            table.add_row(
                "privacy",
                text if math.isfinite(cost) else f"none: {whose} are clipped, without noise",
            )
    if "virtual_seconds" in summary:
        table.add_row("virtual seconds", f"{number(summary, 'virtual_seconds'):.1f}")
    table.add_row("seconds in all", f"{summary['seconds']}")
    names = ("curves.png", "partition.png", "ledger.jsonl")
    there = ", ".join(name for name in names if (folder / name).is_file())
    table.add_row("written to", f"{folder} ({there})")
    console_for_tables().print(table)


def choose(
    plain: PlainDict, typed: list[str], sweep_job: str | None
) -> tuple[PlainDict, Path, bool]:
    """Decide on folder and config: a new run, or one to go on with.

    Returns:
        The config, the folder, and whether to resume.

    Raises:
        CheckpointError: If a run is in the way, or differs from what is asked for.
    """
    resume = plain.get("resume")
    if not isinstance(resume, str | None):
        raise ConfigError(f"resume is {resume!r}; the folder of a run, auto or null is wanted")
    if resume not in {None, "auto"}:
        folder = user_path("resume", resume)
        return go_on(folder, read_trusted(folder, plain), plain, typed), folder, True
    plain = settled_rate(settled_start(settled(plain)), print)
    folder = run_folder(section(plain, "output"), sweep_job)
    if resume == "auto" and (folder / "config.yaml").is_file():
        return go_on(folder, read_trusted(folder, plain), plain, None), folder, True
    refuse_existing(folder)
    return plain, folder, False


def run_folder(output: Mapping[str, object], sweep_job: str | None) -> Path:
    """Choose the folder of a run.

    Args:
        output: The group ``output`` of the config.
        sweep_job: The overrides of this job of a sweep, or None outside a sweep.

    Returns:
        ``output.dir``, or a dated folder; a job of a sweep has a folder of its own in it.
    """
    named = output.get("dir")
    kind = "runs" if sweep_job is None else "multirun"
    stamp = Path(kind) / f"{STARTED:%Y-%m-%d}" / f"{STARTED:%H-%M-%S}"
    folder = stamp if named is None else user_path("output.dir", named)
    return folder if sweep_job is None else folder / sweep_job


def sweep_name(overrides: Sequence[str]) -> str:
    """Name the folder of a sweep's job by what was typed, in the order of the keys.

    Example:
        >>> sweep_name(["seed=1", "output.dir=out", "method=fedavg"])
        'method=fedavg,seed=1'
    """
    naming = sorted(o for o in overrides if not o.startswith(("output.", "resume=", "output=")))
    name = ",".join(naming).replace("/", "_") or "run"
    if len(os.fsencode(name)) <= LONGEST:
        return name
    # What is cut off is in the digest: the same overrides have the same name, others another.
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    room = LONGEST - len(digest) - 1
    return f"{os.fsencode(name)[:room].decode(errors='ignore')}_{digest}"


def run_one(plain: PlainDict, typed: list[str], sweep_job: str | None) -> PlainDict:
    """Run, go on with, or skip one run; print and give its summary."""
    plain, folder, resume = choose(plain, typed, sweep_job)
    if resume and is_done(folder, plain):
        print(f"{folder} is finished already")
        return read_summary(folder)
    with told_how_to_go_on(folder, "simulate"):
        summary = simulate(plain, folder, resume=resume)
    print_outcome(summary, folder, plain)
    return summary


def main(words: Sequence[str]) -> int:
    """Run what the command line asks for."""
    FAILED.clear()
    with composing():
        by_hydra(words)
    return 1 if FAILED else 0


def by_hydra(words: Sequence[str]) -> None:
    """Compose by Hydra what the words ask for, and run it."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra reports errors itself, in ways of its own
    sys.argv[1:] = flags_first(words)
    with in_plain_words(words):
        compose_and_run()


def shows_composed(words: Sequence[str]) -> bool:
    """Print what a command would compose, if its words ask Hydra for that (``--cfg job``)."""
    if not any(word.partition("=")[0] in SHOWS for word in words):
        return False
    by_hydra(words)
    return True


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def compose_and_run(cfg: DictConfig) -> float | None:
    """Run what Hydra composed; the headline metric is the value of a sweep's job."""
    job = HydraConfig.get()
    words = list(map(str, OmegaConf.to_container(job.overrides.task, resolve=False) or ()))
    sweep = sweep_name(words) if job.mode == RunMode.MULTIRUN else None

    def again(words: Sequence[str]) -> PlainDict:
        return plain_of(compose("config", [*job.overrides.hydra, *words]), job.runtime.choices)

    try:
        plain = without_idle(plain_of(cfg, job.runtime.choices), words, again)
        summary = run_one(plain, [key_of(word) for word in words], sweep)
    except Exception as error:  # the other jobs of a sweep go on
        tell(error)
        FAILED.append(sweep or "run")
        return None
    name = headline([summary])
    return None if name is None else number(summary, "metrics", name)
