"""One fault in one small run, and what must come of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path

from flwr.app import Message

from experiments.faults.harms import BEHAVIOURS, HARMS, Once, fault_of, raises
from experiments.faults.network import Fault, Network, client, deploy, nodes_for, rows, summary
from fedraclora.errors import ClientError

ROUNDS = 4
WORDS = [f"rounds={ROUNDS}", "engine.timeout=3"]
ONE = 1  # the client at fault
# What an operator asks for: the round goes on without it; is run again; or the run stops.
POLICIES = {
    "left out": ["engine.min_clients=2"],
    "run again": ["engine.retries=1"],
    "stopped": ["engine.retries=0"],
}
KINDS = (*HARMS, *BEHAVIOURS)


@dataclass(frozen=True)
class Outcome:
    """What came of a fault.

    Attributes:
        kind: What was done.
        policy: A key of `POLICIES`, or ``processes``.
        round_: When.
        verdict: ``right``, or what is wrong.
        reason: Why the client was left out, as the ledger or the error has it.
        seconds: The run took.
    """

    kind: str
    policy: str
    round_: int
    verdict: str
    reason: str
    seconds: float


def absent(missing: Mapping[int, list[int]]) -> Fault:
    """Fail some clients in some rounds: what a run must be equal to that left them out."""
    return raises(lambda m: client(m) in missing.get(int(m.metadata.group_id), []))


def final_weights(words: list[str], fault: Fault | None, clients: int = 3) -> str:
    """Give the digest of the final weights of a run in this process."""
    with tempfile.TemporaryDirectory() as made, redirect_stdout(StringIO()):
        folder = Path(made)
        deploy(words, folder / "run", Network(folder / "cache", nodes_for(clients), fault))
        return str(summary(folder / "run")["weights_digest"])


@lru_cache(maxsize=64)
def reference(round_: int | None) -> str:
    """The final weights where one client is absent in a round; None: nobody ever is."""
    missing = {} if round_ is None else {round_: [ONE]}
    return final_weights([*WORDS, "engine.min_clients=2"], absent(missing))


def inject(kind: str, policy: str, round_: int) -> Outcome:
    """Run with a fault, and hold what comes of it against a run without."""

    def guilty(message: Message) -> bool:
        return client(message) == ONE and message.metadata.group_id == str(round_)

    began = time.monotonic()
    # Weights whole are asked for twice; so it must be guilty of both.
    once = policy == "run again" and kind != "cannot settle on weights"
    rule: Callable[[Message], bool] = Once(guilty) if once else guilty
    words = [*WORDS, *POLICIES[policy]]
    with tempfile.TemporaryDirectory() as made, redirect_stdout(StringIO()):
        folder = Path(made) / "run"
        network = Network(Path(made) / "cache", nodes_for(3), fault_of(kind, rule))
        verdict, reason = _judge(network, folder, words, policy, round_)
    return Outcome(kind, policy, round_, verdict, reason, round(time.monotonic() - began, 2))


def _judge(
    network: Network, folder: Path, words: list[str], policy: str, round_: int
) -> tuple[str, str]:
    """Run; give the verdict and the reason that was said."""
    stopped = ""
    try:
        deploy(words, folder, network)
    except ClientError as error:
        stopped = str(error)
        network.fault = None
        deploy(words, folder, network, resume=True)
    found = str(summary(folder)["weights_digest"])
    done = rows(folder)
    if policy == "left out":
        failures = [(r["round"], f) for r in done[1:] for f in r["failures"]]  # type: ignore[attr-defined]
        if [(at, f["client"]) for at, f in failures] != [(round_, ONE)] or stopped:
            return f"{failures} were left out; {stopped}", ""
        right, reason = found == reference(round_), str(failures[0][1]["reason"])
    else:
        reason = stopped or str(done[round_].get("incidents"))
        if f"client {ONE}: " not in reason:
            return f"nobody was named: {reason}", reason
        right = found == reference(None)
    return ("right" if right else "other final weights"), reason[:300]
