"""Refuse messages of runs that the owner of a node's data has not approved, or beyond limits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedraclora.engines.owner.history import History, Tally
from fedraclora.engines.owner.policy import Limits, Policy
from fedraclora.engines.owner.refusal import OwnerRefusal
from fedraclora.engines.owner.request import RunRequest
from fedraclora.errors import ConfigError

ASK = "ask"
APPROVED = "approved.yaml"  # in the owner's folder, for `ASK`
TERMINAL = Path("/dev/tty")


class RefusedError(Exception):
    """A message is refused.

    Args:
        refusal: The reason, as the server gets it.
    """

    def __init__(self, refusal: OwnerRefusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


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
        self._tally = Tally(history.file)
        self._told: dict[int, set[str]] = {}  # run -> texts, until it may train

    def check(self, run: RunRequest, kind: str, round_: str) -> None:
        """Check a message; tell the owner on this terminal if it is refused.

        Args:
            run: Its run.
            kind: Flower's type of the message.
            round_: Its round; empty for the question whether this node serves.

        Raises:
            RefusedError: If its run is not approved, or a limit is reached.
        """
        if self.file is None:
            return
        try:
            refused = self._refused(self.file, run, round_)
        except (ConfigError, OSError) as error:  # OSError: no terminal, or the disk is full
            self._tell(run, f"every run is refused: {error}")
            raise RefusedError(OwnerRefusal("the owner's policy cannot be read")) from error
        if refused is not None:
            text, refusal = refused
            self._tell(run, text)
            raise RefusedError(refusal)
        if self._told.pop(run.run, None):
            _print(f"run {run.digest[:12]} may train now ({kind})")

    def _refused(self, file: Path, run: RunRequest, round_: str) -> tuple[str, OwnerRefusal] | None:
        """Return what to tell the owner, and why the run is refused; None if it is not."""
        policy = self._policy(file, run)
        if run.digest not in policy.approved:
            text = "A run asks to train on the data of this node, which has not approved it:\n"
            text += f"{run.text}To approve it, add its digest to `approved` in {file}."
            why = f"its owner has not approved the run with digest {run.digest}"
            return text, OwnerRefusal(why)
        if (refusal := self._reached(policy, run, round_)) is not None:
            return f"run {run.digest[:12]} is refused: {refusal}", refusal
        return None

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

    def _reached(self, policy: Policy, run: RunRequest, round_: str) -> OwnerRefusal | None:
        """Return the limit that a run, or this day, has reached."""
        if policy.run == policy.day == Limits():
            return None
        self._tally.update()
        today = datetime.now(UTC).date()
        until = f"{today + timedelta(days=1)} 00:00 UTC"
        for limits, own, of, end in (
            (policy.run, self._tally.of_run(run.digest), "run", ""),
            (policy.day, self._tally.of_day(today.isoformat()), "day", until),
        ):
            # A round has several messages: the last one that is allowed is brought to its end.
            began = bool(round_) and own.has(run.run, round_)
            left = replace(limits, rounds=None) if began else limits
            if reached := left.reached(own.limits):
                return OwnerRefusal(f"its owner's limit is reached: {reached} of a {of}", end)
        return None

    def _tell(self, run: RunRequest, text: str) -> None:
        """Print a text to the node's terminal, once until the run may train."""
        told = self._told.setdefault(run.run, set())
        if text not in told:
            told.add(text)
            _print(text)


def _print(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def ask_owner(text: str) -> bool:
    """Ask on the terminal of the node whether a run may train."""
    # Two handles: a terminal cannot be sought, as one handle for both would need.
    with TERMINAL.open("w", encoding="utf-8") as shown, TERMINAL.open(encoding="utf-8") as typed:
        shown.write(f"A run asks to train on the data of this node:\n{text}Approve it? [y/N] ")
        shown.flush()
        return typed.readline().strip().lower() in {"y", "yes"}
