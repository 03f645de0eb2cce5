"""Hold the agreements of a round of secure aggregation, and unmask its sum."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedraclora.errors import ClientError, RoundLostError, WireError
from fedraclora.protocol.uplinks import Refusal
from fedraclora.wire.secagg import (
    MARK_LENGTH,
    PUBLIC_LENGTH,
    SEALED_LENGTH,
    SHARE_LENGTH,
    Words,
    checked_text,
    combine,
    is_pair,
    mark,
    own_mask,
    pair_mask,
    read_public,
)

# kinds of shares, and the position of their marks in the encrypted text
KINDS = {"alive": 1, "gone": 2}


@dataclass
class Session:
    """Hold a round from the first request for masked vectors on.

    Clients answer that request once, so a round that fails after it is not restarted: it continues
    from here, and asks only the clients that have not replied.

    Attributes:
        round_: From 1.
        keys: Each client's public keys.
        threshold: Shares that recover a secret.
        step: Quantization step.
        messages: Data on its neighbours for each client: ``shares`` by sender, and ``without``,
            neighbours whose share it cannot decrypt but masks with.
        left: Clients that left before.
        words: Masked vectors.
        asked: The neighbours of each client whose share is requested, and which one.
        shares: The clients' shares.
        notes: Other problems: sentences for the ledger.
    """

    round_: int
    keys: dict[int, Any]
    threshold: int
    step: float
    messages: dict[int, Any]
    left: list[Refusal]
    words: dict[int, Words] = field(default_factory=dict)
    asked: dict[int, Any] = field(default_factory=dict)
    shares: dict[int, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def near(self, client: int) -> list[int]:
        """Return the neighbours with whom a client masks its vector."""
        message = self.messages[client]
        return [*map(int, message["shares"]), *message["without"]]

    def drop_isolated(self) -> dict[int, str]:
        """Remove clients with too few remaining neighbours, through no fault of theirs.

        Returns:
            The leaving clients, with reasons.
        """
        leaves: dict[int, str] = {}
        while True:
            waiting = [c for c in self.messages if c not in self.words]
            short = {c: n for c in waiting if (n := len(self.near(c))) < self.threshold}
            if not short:
                return leaves
            leaves |= {
                c: f"only {n} of its neighbours are left, expected {self.threshold} or more"
                for c, n in short.items()
            }
            self._forget(short)

    def _forget(self, gone: Collection[int]) -> None:
        """Remove clients, and from the neighbours of those that have not masked yet."""
        for client in gone:
            del self.messages[client]
            self.words.pop(client, None)
        for client in self.messages.keys() - self.words.keys():
            message = self.messages[client]
            message["shares"] = {n: s for n, s in message["shares"].items() if int(n) not in gone}
            message["without"] = [n for n in message["without"] if n not in gone]

    def settle(self, complaints: dict[int, set[int]]) -> dict[int, str]:
        """Decide how to handle shares that their receivers cannot decrypt.

        Either end may be at fault, so no client is blamed while enough neighbours hold a share of
        the sender: they still mask with it. A sender with too few valid shares leaves, and is
            named.

        Args:
            complaints: By receiver, the senders whose shares it cannot decrypt.

        Returns:
            Who leaves, and why.

        Raises:
            RoundLostError: If two disagree and neither can be left out, or a sender cannot leave
                any more, since some clients have masked with it.
        """
        leaves = {}
        for sender in sorted(set().union(*complaints.values())):
            near = [c for c, message in self.messages.items() if str(sender) in message["shares"]]
            closed = [c for c in near if sender in complaints.get(c, ())]
            if len(near) - len(closed) >= self.threshold:
                continue
            if len(closed) == 1:
                raise RoundLostError(
                    f"round {self.round_}: client {closed[0]} cannot open the share of client "
                    f"{sender} (either may be at fault), and all {len(near)} of its "
                    "neighbours are needed. Raise clients_per_round, or lower "
                    "secure.threshold"
                )
            leaves[sender] = f"clients {closed} cannot open the shares that it sealed for them"
        for sender, why in leaves.items():
            if any(sender in self.near(c) for c in self.words):
                raise CulpritError(self.round_, sender, why)
        for client, senders in complaints.items():
            message = self.messages[client]
            message["without"] += sorted(senders)
            opened = {c: s for c, s in message["shares"].items() if int(c) not in senders}
            message["shares"] = opened
        self._forget([c for c in leaves if c in self.messages])
        return leaves

    def ask_for_shares(self) -> dict[int, Any]:
        """Fix the clients of the sum; return the requests for clients that have not replied yet."""
        if not self.asked:
            self.asked = {
                c: {
                    "alive": [n for n in self.near(c) if n in self.words],
                    "gone": [n for n in self.near(c) if n not in self.words],
                }
                for c in self.words
            }
        # With fewer of them in the sum a client reveals none.
        able = [c for c, asked in self.asked.items() if len(asked["alive"]) >= self.threshold]
        return {c: self.asked[c] for c in able if c not in self.shares}

    def check_shares(self, client: int, sent: Any, answer: Any) -> None:
        """Reject shares other than those encrypted for a client.

        Raises:
            WireError: Naming the found value.
        """
        shares = self.messages[client]["shares"]
        for kind, place in KINDS.items():
            expected = {str(n) for n in sent[kind]} & shares.keys()
            if {*answer[kind]} != expected:
                raise WireError(
                    f"it sent shares of the clients {[*answer[kind]]}, but {sorted(expected)} were "
                    "asked for"
                )
            for owner, share in answer[kind].items():
                if mark(checked_text(share, SHARE_LENGTH)) != shares[owner][place]:
                    raise WireError(f"its share of client {owner} is not the one that was sealed")

    def total(self) -> Words:
        """Add masked vectors, and remove the masks that do not cancel.

        Raises:
            ClientError: If too few shares arrived.
            RoundLostError: If a client's shares do not match its secret.
        """
        total = np.zeros_like(next(iter(self.words.values())))
        for client, row in self.words.items():
            total = total + row - own_mask(self._secret("alive", client), len(row))
        masked = {n for c in self.words for n in self.near(c)}
        for client in sorted(masked - self.words.keys()):
            scalar = self._secret("gone", client)
            # the client would have added this to cancel its neighbour's mask
            for other in self.words:
                if client in self.near(other):
                    public = self.keys[other]["mask"]
                    total = total + pair_mask(scalar, public, len(total), add=client > other)
        return total

    def _secret(self, kind: str, owner: int) -> str:
        """Rebuild a client's secret: the seed of its own mask, or its key."""
        answers = [answer[kind] for answer in self.shares.values()]
        shares = [answer[str(owner)] for answer in answers if str(owner) in answer]
        if len(shares) < self.threshold:
            raise ClientError(
                f"round {self.round_}: {len(shares)} neighbours of client {owner} sent their "
                f"shares, but {self.threshold} are needed to remove its masks: too many "
                "clients dropped out"
            )
        secret, known = "", self.keys[owner]
        try:
            secret = combine(shares[: self.threshold])
        except WireError as error:
            why = f"what it sealed are not shares ({error})"
            raise CulpritError(self.round_, owner, why) from error
        fits = mark(secret) == known["seed"] if kind == "alive" else is_pair(secret, known["mask"])
        if not fits:
            why = "the shares that it sealed are not of its own secret"
            raise CulpritError(self.round_, owner, why)
        return secret


class CulpritError(RoundLostError):
    """A client's misbehaviour made a round fail.

    Attributes:
        client: The client.
        why: The misbehaviour.
    """

    def __init__(self, round_: int, client: int, why: str) -> None:
        super().__init__(f"round {round_}: the sum is lost by client {client}: {why}")
        self.client, self.why = client, why


def check_keys(_client: int, _sent: Any, answer: Any) -> None:
    """Reject a reply without public keys."""
    if {*answer} != {"mask", "box", "seed"}:
        raise WireError(f"it sent the keys {[*answer]}, expected mask, box and seed")
    for name in ("mask", "box"):
        read_public(checked_text(answer[name], PUBLIC_LENGTH))
    checked_text(answer["seed"], MARK_LENGTH)


def check_sealed(_client: int, sent: Any, answer: Any) -> None:
    """Reject a reply without one encrypted text, with two marks, for each neighbour."""
    if {*answer} != {*sent}:
        raise WireError(
            f"it sealed shares for the clients {[*answer]}, expected its neighbours {[*sent]}"
        )
    for text, *marks in answer.values():
        checked_text(text, SEALED_LENGTH)
        if [len(checked_text(m, MARK_LENGTH)) for m in marks] != [MARK_LENGTH] * 2:
            raise WireError(f"its shares have the marks {marks}, expected two SHA-256 digests")
