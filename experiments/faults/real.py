"""Faults of real processes: nodes and the SuperLink are killed, stopped, started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments import deploy
from experiments.faults.network import RANK, SMALL
from experiments.faults.trials import Outcome, absent, final_weights
from fedraclora.engines.deploy.local import LocalDeployment
from fedraclora.errors import EngineError, FedRacLoraError
from fedraclora.ledger import read_ledger

NODES = 3
# A node that was killed is missed after a minute; its key is refused for as long.
WORDS = ["engine.min_clients=1", "engine.wait=180", "engine.timeout=150"]
PATIENCE = 600.0  # seconds for a round


class Drill:
    """One deployment, one run, and faults between its rounds.

    Args:
        deployment: Real processes.
        folder: Of the run.
        rounds: In all.
    """

    def __init__(self, deployment: LocalDeployment, folder: Path, rounds: int) -> None:
        self.deployment, self.folder, self.rounds = deployment, folder, rounds
        self.run: int | None = None

    def begin(self, *, resume: bool = False) -> None:
        """Start the run, or go on with it."""
        rank = [] if resume else [*SMALL, *RANK, *WORDS, f"rounds={self.rounds}"]
        where = f"resume={self.folder}" if resume else f"output.dir={self.folder}"
        every = [] if resume else ["output.checkpoint_every=1", "output.progress=false"]
        order = deploy.prepare([*rank, *every, where], NODES)
        self.run = deploy.submit(order, self.deployment.connection)

    def row(self, round_: int) -> dict[str, object]:
        """Wait for the row of a round.

        Raises:
            EngineError: If it does not come.
        """
        ledger, end = self.folder / "ledger.jsonl", time.monotonic() + PATIENCE
        while time.monotonic() < end:
            found = read_ledger(ledger) if ledger.is_file() else []
            if len(found) > round_:
                return found[round_]
            time.sleep(0.2)
        raise EngineError(f"round {round_} did not end in {PATIENCE:g} s")

    def training(self, k: int) -> None:
        """Wait until a client process of node ``k`` runs."""
        end = time.monotonic() + PATIENCE
        while not client_processes(self.deployment, k) and time.monotonic() < end:
            time.sleep(0.1)

    def end(self) -> str:
        """Wait for the end of the run; give Flower's word for it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.run is not None:
            status = self.deployment.connection.status(self.run)
            if status.ended:
                return status.word
            time.sleep(1)
        return "never ended"


def descendants(pid: int) -> list[tuple[int, str]]:
    """Every process below one, with its command line; the nearest first."""
    listed = subprocess.run(
        ["ps", "-eo", "pid,ppid,args"],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()[1:]]
    found, below = list[tuple[int, str]](), {pid}
    for _ in range(4):
        new = [(int(p), args) for p, above, args in rows if int(above) in below]
        found += [entry for entry in new if entry not in found]
        below = {p for p, _ in new}
    return found


def client_processes(deployment: LocalDeployment, k: int) -> list[int]:
    """The processes of node ``k`` in which a client trains."""
    node = deployment.nodes[k]
    below = [] if node is None else descendants(node.process.pid)
    return [pid for pid, args in below if "flwr-clientapp" in args and "<defunct>" not in args]


def kill(pids: Sequence[int]) -> None:
    """Kill processes that this drill's deployment has started."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill_node(deployment: LocalDeployment, k: int) -> None:
    """Kill a SuperNode with all that it has started."""
    node = deployment.nodes[k]
    if node is not None:
        kill([node.process.pid, *(pid for pid, _ in descendants(node.process.pid))])
        node.process.wait()
        deployment.nodes[k] = None


def kill_link(deployment: LocalDeployment) -> None:
    """Kill the SuperLink with all that it has started, the server of the run included."""
    link = deployment.link.process
    kill([link.pid, *(pid for pid, _ in descendants(link.pid))])
    link.wait()


def restart_node(deployment: LocalDeployment, k: int) -> None:
    """Start a node again, as a supervisor would, until its key is taken."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        node = deployment.start_node(k)
        time.sleep(15)
        if not node.ended:
            return
        time.sleep(5)


def drill(rounds: int, say: Callable[[Outcome], None]) -> None:
    """Inject six faults into one run, and hold its weights against a run in this process.

    Raises:
        FedRacLoraError: If the run does not even go on.
    """
    with tempfile.TemporaryDirectory() as made, LocalDeployment([[0], [1], [2]]) as running:
        folder = Path(made) / "run"
        job, came = Drill(running, folder, rounds), list[tuple[str, int, str]]()
        late = running.nodes[2]
        if late is not None:  # it joins later
            late.end()
            running.nodes[2] = None
        job.begin()
        job.row(1)
        running.start_node(2)
        came.append(("a node is added late", 2, "joined"))
        job.training(0)
        kill(client_processes(running, 0))
        came.append(("the process of a client is killed", 2, "left out"))
        job.row(2)
        job.training(1)
        kill_node(running, 1)
        came.append(("a node is killed mid-round", 3, "left out"))
        job.row(3)
        restart_node(running, 1)
        came.append(("a node that was killed is started again", 4, "joined"))
        job.row(4)
        node = running.nodes[0]
        if node is not None:
            node.end()
        came.append(("a node is stopped by SIGTERM", 5, "left out"))
        job.row(5)
        kill_link(running)
        running.start_link()
        running.start_node(0)
        job.begin(resume=True)
        came.append(("the SuperLink is killed; resume", 6, "went on"))
        word = job.end()
        for outcome in _verdicts(came, folder, word, rounds):
            say(outcome)


def _verdicts(
    came: Sequence[tuple[str, int, str]], folder: Path, word: str, rounds: int
) -> list[Outcome]:
    """Hold a run against one in this process that leaves out the same clients."""
    try:
        done = read_ledger(folder / "ledger.jsonl")
        missing = {
            int(str(r["round"])): [f["client"] for f in r["failures"]]  # type: ignore[attr-defined]
            for r in done[1:]
        }
        found = json.loads((folder / "summary.json").read_text())["weights_digest"]
        words = [f"rounds={rounds}", "engine.min_clients=1"]
        same = found == final_weights(words, absent(missing))
    except (OSError, FedRacLoraError) as error:
        done, missing, same, word = [], {}, False, f"{word}: {error}"
    verdict = "right" if same and word == "finished:completed" else f"wrong ({word})"
    said = {int(str(r["round"])): str(r["failures"])[:300] for r in done[1:]}
    return [Outcome(kind, "processes", at, verdict, said.get(at, ""), 0.0) for kind, at, _ in came]
