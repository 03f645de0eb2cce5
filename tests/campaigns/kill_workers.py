"""``python -m tests.campaigns.kill_workers``: a Ray run that loses a worker ends as if it had not.

A small job runs once on the engine ``vectorized``, for the digests of its weights and its ledger.
Then, as often as asked, it runs on Ray workers, one of which is killed with SIGKILL at a random
moment: in a round drawn uniformly, the start of the workers included. Both digests must come out
the same.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedraclora.errors import FedRacLoraError
from fedraclora.experiments.bench.usage import descendants
from fedraclora.rng import generator
from fedraclora.run.ledger import read_ledger
from fedraclora.terminal.progress import plain_console
from tests.campaigns.kill_resume import TrialError, finish, launch

ROUNDS = 60
JOB = (
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "local.lr=0.1",
    "model.hidden=[24]",
    "clients=60",
    "clients_per_round=40",
    f"rounds={ROUNDS}",
    "engine.chunk=5",
    "output.plots=false",
    "output.progress=false",
    "output.sync=false",
)
WORKER = b"ray::Resident"  # how Ray names our processes


@dataclass(frozen=True)
class Kill:
    """One worker's end: the rows that the ledger had by then, and its process."""

    rows: int
    pid: int


def workers() -> list[int]:
    """Give the processes of Ray workers below this one."""
    found = []
    for pid in descendants():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if command.startswith(WORKER):
            found.append(pid)
    return sorted(found)


def kill_one(process: subprocess.Popen[bytes], folder: Path, trial: int, seed: int) -> Kill:
    """Kill a worker of a run once the ledger has as many rows as are drawn.

    Raises:
        TrialError: If the run ended first.
    """
    rng = generator(seed, "kill worker", trial)
    wanted, delay = int(rng.integers(0, ROUNDS)), float(rng.uniform(0.0, 0.02))
    ledger = folder / "ledger.jsonl"
    while process.poll() is None:
        rows = ledger.read_bytes().count(b"\n") if ledger.is_file() else 0
        alive = workers() if rows >= wanted else []
        if alive:
            time.sleep(delay)
            pid = int(rng.choice(alive))
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # replaced or ended meanwhile: look again
                continue
            return Kill(rows, pid)
        time.sleep(0.001)
    raise TrialError(f"the run ended before row {wanted}: nobody was killed")


def incidents(folder: Path) -> int:
    """Count what the ledger of a run says of lost workers."""
    rows = read_ledger(folder / "ledger.jsonl")
    found = (row.get("incidents") for row in rows)
    return sum(len(lost) for lost in found if isinstance(lost, list))


def main(words: Sequence[str] | None = None) -> int:
    """Run the trials; status 1 if one of them went wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--times", type=int, default=50, help="runs that lose a worker")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args(words)
    console, good = plain_console(), 0
    on_ray = [*JOB, "engine=ray", "engine.chunk=5", f"engine.workers={asked.workers}"]
    with tempfile.TemporaryDirectory(prefix="kill-workers-") as root:
        whole = Path(root) / "vectorized"
        wanted = finish(launch(JOB, whole, resume=False), whole)
        for trial in range(1, asked.times + 1):
            folder = Path(root) / f"{trial:03d}"
            try:
                process = launch(on_ray, folder, resume=False)
                kill = kill_one(process, folder, trial, asked.seed)
                same = finish(process, folder) == wanted
                told = incidents(folder)
                verdict = "same digests" if same else "DIFFERENT digests"
                console.print(
                    f"{trial:3} worker {kill.pid} killed at row {kill.rows:2}; "
                    f"{told} incident(s) in the ledger; {verdict}"
                )
            except FedRacLoraError as error:
                same = False
                console.print(f"{trial:3} {error}")
            good += same
    console.print(f"{good} of {asked.times} runs ended with the digests of the run on one process")
    return 0 if good == asked.times else 1


if __name__ == "__main__":
    sys.exit(main())
