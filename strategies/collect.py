"""From replies to uplinks: every check that runs before any sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import Message

from fedraclora.aggregate import Refusal, Uplinks, check_rows, too_many
from fedraclora.errors import ClientError, WireError
from fedraclora.method import Cohort, Downlink
from fedraclora.sampling import client_weights
from fedraclora.tree import Layout
from fedraclora.wire import Reply, unpack_trial


@dataclass
class Exchange:
    """One downlink and what came back.

    Attributes:
        downlink: What was asked.
        layout: What each client must send.
        round_: From 1.
        version: Of the base weights the clients trained from.
        cohort: Who was asked.
        replies: In ascending order of client, once collected.
        failures: Clients whose reply is not used.
        received: Rows that came, those that were refused included.
        chunks: The messages that were sent, each with its clients.
        before: The exchange before this one in the same round.
        mean_loss: Mean training loss over the clients whose replies are used.
    """

    downlink: Downlink
    layout: Layout
    round_: int
    version: int
    cohort: Cohort
    replies: list[Reply] = field(default_factory=list)
    failures: list[Refusal] = field(default_factory=list)
    received: int = 0
    chunks: list[tuple[Message, list[int]]] = field(default_factory=list)
    before: Exchange | None = None
    mean_loss: float = float("nan")

    def collect(self, messages: Iterable[Message], weighting: str, allowed: int) -> Uplinks:
        """Read, check and sort the replies.

        Args:
            messages: Replies, in any order.
            weighting: ``examples`` or ``uniform``.
            allowed: Clients that may fail.

        Returns:
            The uplinks of the clients that passed, in ascending order of id.

        Raises:
            ClientError: If more clients failed than allowed, or none is left.
            WireError: If a reply is of another round, another layout or another client.
        """
        for message in messages:
            self._read(message)
        if not self.replies and self.failures:
            raise too_many(self.all_failures, self.round_, allowed)
        if not self.replies:
            raise ClientError(f"round {self.round_}: no client replied in time")
        self.replies.sort(key=lambda r: int(r.clients[0]) if len(r.clients) else -1)
        clients = torch.cat([r.clients for r in self.replies])
        rows = torch.cat([r.rows for r in self.replies])
        losses = torch.cat([r.losses for r in self.replies])
        weights = client_weights(weighting, torch.cat([r.samples for r in self.replies]))
        self._check_ids(clients.tolist())
        refused = check_rows(clients, weights, losses, rows)
        self.failures += refused
        if len(self.all_failures) > allowed or len(refused) == len(clients):
            raise too_many(self.all_failures, self.round_, allowed)
        self.received = len(clients)
        if refused:
            keep = ~torch.isin(clients, torch.tensor([r.client for r in refused]))
            clients, rows = clients[keep], rows[keep]
            weights, losses = weights[keep], losses[keep]
        self.mean_loss = float(losses.mean())
        versions = torch.full_like(clients, self.version)
        return Uplinks(clients, weights, self.layout, rows, versions=versions)

    def _read(self, message: Message) -> None:
        if message.has_error():
            asked = message.metadata.reply_to_message_id
            for sent, clients in self.chunks:
                if sent.metadata.message_id == asked:
                    self.failures += [Refusal(c, str(message.error.reason)) for c in clients]
            return
        reply = unpack_trial(message.content, self.layout)
        if (reply.round_, reply.version) != (self.round_, self.version):
            raise WireError(
                f"clients {reply.clients.tolist()} answered for round {reply.round_} from version "
                f"{reply.version}; round {self.round_} from version {self.version} was wanted"
            )
        self.replies.append(reply)
        self.failures += [Refusal(c, r) for c, r in reply.failures.items()]

    def _check_ids(self, clients: Sequence[int]) -> None:
        """Hold who answered against the cohort: each once and none else; note who is silent."""
        answered = sorted([*clients, *(f.client for f in self.failures)])
        wanted = self.cohort.clients.tolist()
        if answered == wanted:
            return
        if len(answered) != len(set(answered)) or not set(answered) <= set(wanted):
            raise WireError(
                f"round {self.round_}: clients {answered} answered, each of {wanted} was wanted "
                "once"
            )
        missing = sorted(set(wanted) - set(answered))
        self.failures += [Refusal(c, "no reply in time") for c in missing]

    def survivors(self) -> Cohort:
        """The clients whose replies were used: those whom the next exchange asks."""
        failed = torch.tensor([f.client for f in self.failures], dtype=torch.int64)
        kept = ~torch.isin(self.cohort.clients, failed)
        return Cohort(self.cohort.clients[kept], self.cohort.weights[kept])

    @property
    def first(self) -> Exchange:
        """The exchange that opened the round."""
        return self if self.before is None else self.before.first

    @property
    def all_failures(self) -> list[Refusal]:
        """Clients that failed in this round so far."""
        earlier = [] if self.before is None else self.before.all_failures
        return [*earlier, *self.failures]

    @property
    def local_steps(self) -> int:
        """Local steps of this round so far, over the clients that answered."""
        earlier = 0 if self.before is None else self.before.local_steps
        return earlier + sum(int(reply.steps.sum()) for reply in self.replies)

    @property
    def notes(self) -> list[str]:
        """Notes of the workers in this round so far."""
        earlier = [] if self.before is None else self.before.notes
        return [*earlier, *(note for reply in self.replies for note in reply.notes)]
