"""``python -m tests.campaigns.kill_resume``: a run that was killed ends like one that was not.

A small job runs once to its end, for the digests of its weights and its ledger. Then, as often as
asked, it is started in a process of its own, killed with SIGKILL at a moment drawn uniformly over
the time that the whole job takes, from the start of the process on, and gone on with
(``resume=auto``), where it may be killed again. Both digests must come out the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from fedraclora.errors import FedRacLoraError
from fedraclora.rng import generator
from fedraclora.run.folder import read_summary
from fedraclora.run.ledger import digest_rows, read_ledger
from fedraclora.terminal.progress import console_for_tables
from fedraclora.weights.files import load_checkpoint

JOB = (
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "local.lr=0.1",
    "model.hidden=[24]",
    "clients=40",
    "clients_per_round=8",
    "rounds=100",
    "engine.chunk=3",
    "output.checkpoint_every=7",
    "output.plots=false",
    "output.progress=false",
)
DIGESTS = ("weights_digest", "ledger_digest")
AGAIN = 0.5  # probability that a run which goes on is killed once more


class TrialError(FedRacLoraError):
    """A run of the job ended with an error; the message holds its last words."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: seconds after the start of the process, and what it left on the disk."""

    second: float
    left: str


@dataclass
class Trial:
    """One job that was killed and gone on with.

    Attributes:
        number: From 1.
        kills: In order.
        verdict: ``same``, or what went wrong.
    """

    number: int
    kills: list[Kill] = field(default_factory=list)
    verdict: str = "same"


def left_behind(folder: Path) -> str:
    """Describe a run folder in a few words: which files, how many rows, which checkpoint."""
    if not folder.is_dir():
        return "nothing"
    if not (folder / "config.yaml").is_file():
        return "no config"
    if (folder / "summary.json").is_file():
        return "summary"
    ledger = folder / "ledger.jsonl"
    rows = ledger.read_bytes().count(b"\n") if ledger.is_file() else 0
    links = len(list((folder / "chain").glob("*.safetensors")))
    saved = "none"
    if (folder / "checkpoint" / "checkpoint.safetensors").is_file():
        saved = str(load_checkpoint(folder / "checkpoint")[1]["round"])
    return f"{rows} rows, {links} links, checkpoint {saved}"


def launch(job: Sequence[str], folder: Path, *, resume: bool) -> subprocess.Popen[bytes]:
    """Start the job in a process of its own; what it says goes to ``<folder>.log``."""
    words = [*job, f"output.dir={folder}", *(["resume=auto"] if resume else [])]
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fedraclora.commands.cli", "simulate", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def finish(process: subprocess.Popen[bytes], folder: Path) -> dict[str, str]:
    """Wait for the end of a run; read the digests of its weights, its ledger and the ledger's file.

    Raises:
        TrialError: If it ended with another status than 0.
    """
    if process.wait() != 0:
        said = folder.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        last = " / ".join(said[-3:])
        raise TrialError(f"status {process.returncode} from [{left_behind(folder)}]: {last}")
    summary = read_summary(folder)
    found = {name: str(summary[name]) for name in DIGESTS}
    return found | {"ledger.jsonl": digest_rows(read_ledger(folder / "ledger.jsonl"))}


def kill_after(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Kill a process after so many seconds; False if it had ended by then."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def kill_and_resume(
    job: Sequence[str], folder: Path, number: int, wall: float, *, seed: int, most: int
) -> tuple[Trial, dict[str, str]]:
    """Run the job under fire.

    Args:
        job: Overrides of ``fedraclora simulate``.
        folder: The run folder, not there yet.
        number: Of the trial; keys its moments.
        wall: Seconds that the job takes; kills are drawn uniformly below it.
        seed: Of the moments.
        most: Kills at most.

    Returns:
        What happened, and the digests at the end (empty if it could not be gone on with).
    """
    trial = Trial(number)
    rng = generator(seed, "kill", number)
    process = launch(job, folder, resume=False)
    while len(trial.kills) < most and (not trial.kills or rng.random() < AGAIN):
        moment = float(rng.random()) * wall
        if not kill_after(process, moment):
            if trial.kills:
                break
            folder = folder.with_name(f"{folder.name}_")  # it ended first: start another
            process = launch(job, folder, resume=False)
            continue
        trial.kills.append(Kill(moment, left_behind(folder)))
        process = launch(job, folder, resume=True)
    try:
        return trial, finish(process, folder)
    except TrialError as error:
        trial.verdict = str(error)
        return trial, {}


def trials(job: Sequence[str], times: int, *, seed: int, most: int, root: Path) -> Iterator[Trial]:
    """Run the job once in peace, then under fire; give each trial with its verdict.

    Args:
        job: Overrides of ``fedraclora simulate``.
        times: Trials.
        seed: Of the moments of the kills.
        most: Kills per trial at most.
        root: An empty folder for the runs.

    Yields:
        The trials, one after another.

    Raises:
        TrialError: If the job fails even in peace.
    """
    began = time.perf_counter()
    wanted = finish(launch(job, root / "whole", resume=False), root / "whole")
    wall = time.perf_counter() - began
    for number in range(1, times + 1):
        folder = root / f"trial{number}"
        trial, found = kill_and_resume(job, folder, number, wall, seed=seed, most=most)
        differing = [name for name, value in found.items() if value != wanted[name]]
        if differing:
            trial.verdict = f"{' and '.join(differing)} differ"
        yield trial


def show(found: Sequence[Trial]) -> None:
    """Print the table of trials."""
    table = Table("trial", "killed after", "left behind", "digests")
    for trial in found:
        seconds = "\n".join(f"{kill.second:.2f} s" for kill in trial.kills)
        table.add_row(
            str(trial.number), seconds, "\n".join(k.left for k in trial.kills), trial.verdict
        )
    same = sum(trial.verdict == "same" for trial in found)
    kills = sum(len(trial.kills) for trial in found)
    console_for_tables().print(table)
    print(f"{same} of {len(found)} runs, killed {kills} times in all, ended as if never killed")


def main(words: Sequence[str] | None = None) -> int:
    """Read the command line, run the trials, and give the exit status: 1 on any difference."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.kill_resume", description=__doc__
    )
    parser.add_argument("--times", type=int, default=20, help="trials (20)")
    parser.add_argument("--method", default="fed_rac_lora", help="method (fed_rac_lora)")
    parser.add_argument("--kills", type=int, default=4, help="kills per trial at most (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (0)")
    parser.add_argument("overrides", nargs="*", help="further overrides of fedraclora simulate")
    chosen = parser.parse_args(words)
    job = [*JOB, f"method={chosen.method}", *chosen.overrides]
    with tempfile.TemporaryDirectory(prefix="kill_resume_") as name:
        root = Path(name)
        try:
            found = list(trials(job, chosen.times, seed=chosen.seed, most=chosen.kills, root=root))
        except TrialError as error:
            print(f"error: the job fails without any kill: {error}", file=sys.stderr)
            return 1
    show(found)
    return int(any(trial.verdict != "same" for trial in found))


if __name__ == "__main__":
    sys.exit(main())
