"""Faults of real processes: nodes and the SuperLink are killed, stopped, started again."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedraclora.commands import deploy
from fedraclora.engines.deploy.control import Status
from fedraclora.engines.deploy.local import LocalDeployment
from fedraclora.errors import EngineError, FedRacLoraError
from fedraclora.experiments.faults.network import RANK, SMALL
from fedraclora.experiments.faults.trials import TrialOutcome, absent, final_weights
from fedraclora.run.folder import read_summary
from fedraclora.run.ledger import read_ledger

# A node that was killed is missed after a minute; its key is refused for as long. No limit here is
# a measure: they end what hangs.
WORDS = ["engine.min_clients=1", "engine.wait=900", "engine.timeout=900"]
PATIENCE = 3600.0  # seconds for a round
TAKEN = "SuperNode ID"  # what a node says whose key is taken
LINK = "the SuperLink is killed; resume"


class Drill:
    """One deployment, one run, and faults between its rounds.

    Args:
        deployment: Real processes.
        folder: Of the run.
        words: What the run has beside the small job of the campaign.
    """

    def __init__(self, deployment: LocalDeployment, folder: Path, words: Sequence[str]) -> None:
        self.deployment, self.folder, self.words = deployment, folder, words
        self.run: int | None = None

    def begin(self, *, resume: bool = False) -> None:
        """Start the run, or go on with it."""
        words = [f"resume={self.folder}"]
        if not resume:
            words = [*SMALL, *RANK, *WORDS, "output.checkpoint_every=1", "output.progress=false"]
            words += [*self.words, f"output.dir={self.folder}"]
        request = deploy.prepare(words, len(self.deployment.nodes))
        self.run = deploy.submit(request, self.deployment.connection)

    def rows(self) -> list[dict[str, object]]:
        """The ledger so far; row 0 is what is measured before the first round."""
        ledger = self.folder / "ledger.jsonl"
        return read_ledger(ledger) if ledger.is_file() else []

    def rounds_until(self, round_: int, meanwhile: Callable[[], None] = lambda: None) -> int:
        """Wait until a round has ended; give the number of the one that goes on now.

        Args:
            round_: The round.
            meanwhile: Is called again and again.
        """

        def has_ended() -> bool:
            meanwhile()
            return len(self.rows()) > round_

        wait_for(has_ended, f"the end of round {round_}")
        return len(self.rows())

    def kill_for_a_round(self, k: int) -> int:
        """Kill the client at node ``k`` whenever it comes up, for a whole round; give which.

        It is missed there: to come up takes longer than to be found.
        """

        def kill() -> None:
            signal_clients(self.deployment, k, signal.SIGKILL)

        at = self.rounds_until(len(self.rows()), kill)
        self.rounds_until(at, kill)
        return at

    def catch(self, k: int) -> None:
        """Stop the client at node ``k`` while it has nothing to do, and wait for a message.

        Who brings that is stopped, too: it would end a client that is silent for long.
        """
        wait_for(lambda: bool(client_processes(self.deployment, k)), f"a client at node {k}")

        def is_stopped_idle() -> bool:
            signal_clients(self.deployment, k, signal.SIGSTOP)
            if unanswered(self.deployment, k):
                signal_clients(self.deployment, k, signal.SIGCONT)
                return False
            return True

        wait_for(is_stopped_idle, f"a pause of node {k}")
        wait_for(lambda: unanswered(self.deployment, k), f"work at node {k}")
        wait_for(lambda: bool(bringers(self.deployment, k)), f"a message at node {k}")
        for pid in bringers(self.deployment, k):
            os.kill(pid, signal.SIGSTOP)

    def release(self, k: int) -> None:
        """Let what was caught at node ``k`` go on."""
        signal_clients(self.deployment, k, signal.SIGCONT)
        for pid in bringers(self.deployment, k):
            os.kill(pid, signal.SIGCONT)

    def end(self) -> Status:
        """Wait for the end of the run; give what Flower says of it."""
        run, link = self.run or 0, self.deployment.connection
        wait_for(lambda: link.status(run).ended, "the end of the run")
        return link.status(run)


def wait_for(ready: Callable[[], bool], what: str) -> None:
    """Wait for something; an EngineError if it does not come."""
    end = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > end:
            raise EngineError(f"{what} did not come in {PATIENCE:g} s")
        time.sleep(0.2)


def client_processes(deployment: LocalDeployment, k: int) -> list[int]:
    """The process of node ``k`` in which its client trains, if there is one."""
    node = deployment.nodes[k]
    return (
        []
        if node is None
        else pgrep("-g", str(node.process.pid), "-f", "fedraclora.clients.resident")
    )


def bringers(deployment: LocalDeployment, k: int) -> list[int]:
    """Flower's processes of node ``k`` that wait for an answer of its client."""
    node = deployment.nodes[k]
    words = [] if node is None else ["-g", str(node.process.pid), "-f", "flower-superexec"]
    return pgrep(*words)[2:] if words else []  # after the SuperExec, and what forks the others


def unanswered(deployment: LocalDeployment, k: int) -> bool:
    """Whether node ``k`` has a train message that it has not answered."""
    node = deployment.nodes[k]
    said = "" if node is None else node.file.read_text(errors="replace")
    return said.count("Receiving: train") > said.count("Sending: train")


def pgrep(*words: str) -> list[int]:
    """Find processes."""
    asked = ["pgrep", *words]
    listed = subprocess.run(asked, capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def signal_clients(deployment: LocalDeployment, k: int, sign: int) -> None:
    """Send a signal to the process of node ``k`` in which its client trains."""
    for pid in client_processes(deployment, k):
        with suppress(ProcessLookupError):
            os.kill(pid, sign)


def end_node(deployment: LocalDeployment, k: int, *, killed: bool = False) -> None:
    """End a SuperNode with all that it has started, in order or not."""
    node = deployment.nodes[k]
    if node is not None:
        if killed:
            node.signal_all(signal.SIGKILL)
        node.end()
        deployment.nodes[k] = None


def restart_link(deployment: LocalDeployment) -> None:
    """Kill the SuperLink, with the server of the run, and start it again."""
    if (link := deployment.link) is None:
        raise EngineError("no SuperLink runs that could be killed")
    below = pgrep("-P", str(link.process.pid))  # a SuperExec, which leads a group with the server
    link.signal_all(signal.SIGKILL)
    for pid in below:
        os.killpg(pid, signal.SIGKILL)
    link.end()
    deployment.start_link()


def restart_node(deployment: LocalDeployment, k: int) -> None:
    """Start a node again, as a supervisor would, until its key is taken."""

    def is_taken() -> bool:
        node = deployment.start_node(k)
        wait_for(lambda: node.ended or TAKEN in node.file.read_text(errors="replace"), TAKEN)
        if node.ended:
            node.end()
            time.sleep(5)
        return not node.ended

    wait_for(is_taken, f"the return of node {k}")


@dataclass(frozen=True)
class Injected:
    """What was done to real processes, and what must follow.

    Attributes:
        kind: What was done.
        round_: The round that went on.
        client: Whom it concerns; None: all.
        joins: Whether it takes part afterwards; else it is left out of that round.
    """

    kind: str
    round_: int
    client: int | None
    joins: bool

    def shows(self, missing: Mapping[int, list[int]]) -> bool:
        """Tell whether that is so, by whom each round left out."""
        if self.client is None:
            return self.round_ in missing
        if self.joins:
            return any(self.client not in m for r, m in missing.items() if r >= self.round_)
        return self.client in missing.get(self.round_, [])


def drill(rounds: int, say: Callable[[TrialOutcome], None]) -> None:
    """Inject six faults into one run, and hold its weights against a run in this process.

    Raises:
        FedRacLoraError: If the run does not even go on.
    """
    nodes = LocalDeployment([[0], [1], [2]], lasting=True)
    with tempfile.TemporaryDirectory() as made, nodes as running:
        job, came = Drill(running, Path(made) / "run", [f"rounds={rounds}"]), list[Injected]()
        end_node(running, 2)  # it joins later
        job.begin()
        at = job.rounds_until(1)
        running.start_node(2)
        came.append(Injected("a node is added late", at, 2, joins=True))
        at = job.kill_for_a_round(0)
        came.append(Injected("the process of a client is killed", at, 0, joins=False))
        job.catch(1)
        at = len(job.rows())
        end_node(running, 1, killed=True)
        came.append(Injected("a node is killed mid-round", at, 1, joins=False))
        at = job.rounds_until(at)
        job.catch(0)  # a key is refused for longer than rounds take: the run waits meanwhile
        restart_node(running, 1)
        job.release(0)
        came.append(Injected("a node that was killed is started again", at, 1, joins=True))
        job.rounds_until(at)
        job.catch(0)
        at = len(job.rows())
        job.release(0)  # SIGTERM means nothing to who is stopped
        end_node(running, 0)
        came.append(Injected("a node is stopped by SIGTERM", at, 0, joins=False))
        at = job.rounds_until(at)
        restart_link(running)
        running.start_node(0)
        came.append(Injected(LINK, at, None, joins=True))
        job.begin(resume=True)
        for outcome in _verdicts(came, job, job.end()):
            say(outcome)


def _verdicts(came: Sequence[Injected], job: Drill, ended: Status) -> list[TrialOutcome]:
    """Hold a run against one in this process that leaves out the same clients."""
    missing, said, verdict = dict[int, list[int]](), dict[int, str](), "right"
    try:
        for row in job.rows()[1:]:
            failures, at = row["failures"], int(str(row["round"]))
            missing[at] = [f["client"] for f in failures]  # type: ignore[attr-defined]
            said[at] = str(failures)[:300]
        found = read_summary(job.folder)["weights_digest"]
        if found != final_weights([*job.words, "engine.min_clients=1"], absent(missing)):
            verdict = "other final weights"
    except (OSError, FedRacLoraError) as error:
        verdict = f"{ended.word}: {ended.details or error}"
    return [
        TrialOutcome(
            fault.kind,
            "processes",
            fault.round_,
            verdict if fault.shows(missing) else f"it does not show ({verdict})",
            said.get(fault.round_, ""),
            0.0,
        )
        for fault in came
    ]
