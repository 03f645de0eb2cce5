"""Refuse messages of runs that the owner of a node's data has not approved, or beyond limits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from fedraclora.engines.owner.history import TRAIN, History, used
from fedraclora.engines.owner.policy import Limits, Policy
from fedraclora.engines.owner.request import RunRequest
from fedraclora.errors import ConfigError

ASK = "ask"
APPROVED = "approved.yaml"  # in the owner's folder, for `ASK`
TERMINAL = Path("/dev/tty")


class RefusedError(Exception):
    """The reason for which a message is refused, as the server gets it."""


class Gate:
    """Check the messages of runs against an owner's policy.

    The policy is read for each message: what the owner changes counts at once.

    Args:
        policy: A file (`Policy`), `ASK`, or None: every run may train.
        history: What limits are compared with.
        ask: Shows the owner a description of a run; returns whether it is approved.
    """

    def __init__(
        self, policy: str | None, history: History, ask: Callable[[str], bool] | None = None
    ) -> None:
        self.history, self.ask = history, (ask or ask_owner) if policy == ASK else None
        self.file = None if policy is None else Path(policy)
        if self.ask is not None:
            self.file = history.file.with_name(APPROVED)
        self._declined: set[str] = set()
        self._told: set[str] = set()

    def check(self, run: RunRequest, kind: str, round_: str) -> None:
        """Check a message.

        Args:
            run: Its run.
            kind: Flower's type of the message.
            round_: Its round.

        Raises:
            RefusedError: If its run is not approved, or a limit is reached.
        """
        if self.file is None:
            return
        try:
            policy = self._policy(self.file, run)
        except (
            ConfigError,
            OSError,
        ) as error:  # OSError: the terminal is gone, or the disk is full
            self._tell(f"every run is refused: {error}")
            raise RefusedError("the policy of the owner of this node's data is broken") from error
        if run.digest not in policy.approved:
            self._tell(
                "A run asks to train on the data of this node, which has not approved it:\n"
                f"{run.text}To approve it, add its digest to `approved` in {self.file}."
            )
            raise RefusedError(
                f"the owner of this node's data has not approved the run with digest {run.digest}"
            )
        if kind.startswith(TRAIN) and (reached := self._reached(policy, run)):
            self._tell(f"run {run.digest[:12]}, round {round_}: refused, the limit {reached}")
            raise RefusedError(f"the owner of this node's data has reached the limit {reached}")

    def _policy(self, file: Path, run: RunRequest) -> Policy:
        """Read the policy; ask the owner about a new run."""
        if self.ask is None:
            return Policy.read(file)
        known = Policy.read(file) if file.exists() else Policy(frozenset())
        if run.digest not in known.approved | self._declined:
            if self.ask(run.text):
                known = known.with_approved(run.digest)
                known.write(file)
            else:
                self._declined.add(run.digest)
        return known

    def _reached(self, policy: Policy, run: RunRequest) -> str | None:
        """Return the limit that a run, or this day, has reached."""
        if policy.run == policy.day == Limits():
            return None
        entries, today = self.history.entries(), datetime.now(UTC).date().isoformat()
        of_run = policy.run.reached(used(e for e in entries if e.digest == run.digest))
        of_day = policy.day.reached(used(e for e in entries if e.time.startswith(today)))
        return (of_run and f"{of_run} of a run") or (of_day and f"{of_day} of a day")

    def _tell(self, text: str) -> None:
        """Print a text to the node's terminal, once."""
        if text not in self._told:
            self._told.add(text)
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def ask_owner(text: str) -> bool:
    """Ask on the terminal of the node whether a run may train."""
    # Two handles: a terminal cannot be sought, as one handle for both would need.
    with TERMINAL.open("w", encoding="utf-8") as shown, TERMINAL.open(encoding="utf-8") as typed:
        shown.write(f"A run asks to train on the data of this node:\n{text}Approve it? [y/N] ")
        shown.flush()
        return typed.readline().strip().lower() in {"y", "yes"}
