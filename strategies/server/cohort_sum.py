"""Sum the rows of a round's clients as replies arrive, if no step needs single updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fedraclora.protocol.cohorts import client_weights
from fedraclora.protocol.method import Cohort, RoundInstructions
from fedraclora.protocol.rank_budgets import widen
from fedraclora.protocol.uplinks import Refusal, RunningSum, check_rows, norms_of
from fedraclora.wire.answers import SummedAnswer, TrainingAnswer
from fedraclora.wire.exchange import Ask

Taken = tuple[
    TrainingAnswer, list[Refusal]
]  # the rest of a reply, and the clients whose rows the sum excludes


class CohortSum(RunningSum):
    """Add rows in the order of clients; an early reply waits for its turn.

    Args:
        downlink: The instructions.
        cohort: The clients whose replies are used.
        weighting: ``samples`` or ``uniform``.
        size: Numbers of a row.

    Attributes:
        longest: The client whose row has the largest norm, and that norm; None before there is one.
    """

    def __init__(
        self, downlink: RoundInstructions, cohort: Cohort, weighting: str, size: int
    ) -> None:
        super().__init__(size)
        self.downlink, self.cohort, self.weighting = downlink, cohort, weighting
        self.waiting: dict[int, tuple[Sequence[int], TrainingAnswer | None]] = {}
        self.turn = 0
        self.longest: tuple[int, float] | None = None

    def take(self, ask: Ask, reply: TrainingAnswer | None) -> Iterator[Taken]:
        """Accept the reply to a request, and yield the replies whose rows were added because of it.

        Args:
            ask: The request.
            reply: The reply; None if its clients failed.
        """
        self.waiting[ask.request.first] = ask.clients, reply
        while self.turn in self.waiting:
            asked, reply = self.waiting.pop(self.turn)
            self.turn += len(asked)
            if reply is not None:
                yield self._added(asked, reply)

    def rest(self) -> Iterator[Taken]:
        """Yield the replies that waited for clients that did not reply."""
        for place in sorted(self.waiting):
            asked, reply = self.waiting.pop(place)
            if reply is not None:
                yield self._added(asked, reply)

    def _added(self, asked: Sequence[int], reply: TrainingAnswer) -> Taken:
        """Check and add the rows of a reply; return the rest of it, without views of the rows.

        A reply of clients that were not asked is not changed.
        """
        if not set(reply.clients.tolist()) <= set(asked):
            return reply, []
        if isinstance(reply, SummedAnswer):
            self.add_blocks(reply.numbers)
            left = reply.numbers.new_empty(0, reply.shape[1])
            return replace(reply, pieces=(left,)), []
        places = torch.searchsorted(self.cohort.clients, reply.clients)
        pieces = reply.pieces
        if self.downlink.ranks is not None:
            pieces = (widen(reply.numbers, self.downlink, places),)
        weights, norms = client_weights(self.weighting, reply.samples), norms_of(pieces)
        refused = check_rows(
            reply.clients, weights, reply.losses, pieces, norms, self.downlink.layout
        )
        if refused:
            kept = ~torch.isin(reply.clients, torch.tensor([r.client for r in refused]))
            reply = reply.select(kept)
            pieces = tuple(piece[kept] for piece in pieces)
            weights, places, norms = weights[kept], places[kept], norms[kept]
        if len(norms):
            self.add(pieces, weights, places)
            found = int(reply.clients[norms.argmax()]), float(norms.max())
            # Among equal norms that of the first client.
            self.longest = max(self.longest or found, found, key=lambda pair: pair[1])
        width = sum(piece.shape[1] for piece in pieces)
        return replace(reply, pieces=(pieces[0].new_empty(0, width),)), refused
