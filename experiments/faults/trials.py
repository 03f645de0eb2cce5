"""Faults in small runs, and what must come of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path

from flwr.app import Message

from fedraclora.errors import ClientError
from fedraclora.experiments.faults.harms import BEHAVIOURS, HARMS, Once, fault_of, raises
from fedraclora.experiments.faults.network import Fault, Network, client, deploy, nodes_for, rows
from fedraclora.run.folder import read_summary

ONE = 1  # the client at fault
# What an operator asks for: the round goes on without it; is run again; or the run stops.
POLICIES = {
    "left out": ["engine.min_clients=2"],
    "run again": ["engine.retries=1"],
    "stopped": ["engine.retries=0"],
}
FAULT_KINDS = (*HARMS, *BEHAVIOURS)


@dataclass(frozen=True)
class TrialOutcome:
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
        return str(read_summary(folder / "run")["weights_digest"])


def guilty_in(round_: int) -> Callable[[Message], bool]:
    """Find the messages of a round to the client at fault."""
    return lambda m: client(m) == ONE and m.metadata.group_id == str(round_)


def one_after_another(faults: Mapping[int, Fault]) -> Fault:
    """Let each round have its fault."""

    def fault(message: Message, call: Callable[[], Message]) -> list[Message]:
        reply = cached(call)
        for each in faults.values():  # those of other rounds may want to see it
            answers = each(message, reply)
            if len(answers) != 1 or answers[0] is not reply():
                return answers
        return [reply()]

    return fault


def cached(call: Callable[[], Message]) -> Callable[[], Message]:
    """Call once, and only if it is asked for."""
    return lru_cache(maxsize=1)(call)


def inject(kinds: Sequence[str], policy: str) -> list[TrialOutcome]:
    """Run with a fault in each round from the second on, and hold it against a run without.

    Args:
        kinds: Of `FAULT_KINDS`, one for each round.
        policy: Of `POLICIES`; with ``stopped`` one kind alone.
    """
    began = time.monotonic()
    when = dict(enumerate(kinds, start=2))
    again = policy == "run again"
    faults = {
        r: fault_of(kind, Once(guilty_in(r)) if again else guilty_in(r)) for r, kind in when.items()
    }
    words = [f"rounds={max(when) + 1}", "engine.timeout=3", *POLICIES[policy]]
    with tempfile.TemporaryDirectory() as made, redirect_stdout(StringIO()):
        folder = Path(made) / "run"
        network = Network(Path(made) / "cache", nodes_for(3), one_after_another(faults))
        stopped = ""
        try:
            deploy(words, folder, network)
        except ClientError as error:
            stopped = str(error)
            network.fault = None
            deploy(words, folder, network, resume=True)
        found, done = str(read_summary(folder)["weights_digest"]), rows(folder)
    missing = {r: [ONE] for r in when} if policy == "left out" else {}
    same = found == final_weights([words[0], "engine.min_clients=2"], absent(missing))
    seconds = round((time.monotonic() - began) / len(when), 2)
    outcomes = []
    for round_, kind in when.items():
        reason, verdict = said(done[round_], policy, stopped), "other final weights"
        if not named(done[round_], policy, reason):
            verdict = f"client {ONE} was not named: {done[round_]}"
        elif same:
            verdict = "right"
        outcomes.append(TrialOutcome(kind, policy, round_, verdict, reason[:300], seconds))
    return outcomes


def said(row: Mapping[str, object], policy: str, stopped: str) -> str:
    """Give what was said of the fault of a round."""
    if policy == "left out":
        return "; ".join(str(f["reason"]) for f in row["failures"])  # type: ignore[attr-defined]
    return str(row.get("incidents")) if policy == "run again" else stopped


def named(row: Mapping[str, object], policy: str, reason: str) -> bool:
    """Tell whether the client at fault was named, and no other."""
    if policy == "left out":
        return [f["client"] for f in row["failures"]] == [ONE]  # type: ignore[attr-defined]
    return f"client {ONE}: " in reason and not row["failures"]
