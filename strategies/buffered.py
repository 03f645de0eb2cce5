"""The strategy for clients that are not waited for: FedBuff on the virtual clock of the devices.

A round is a step of the server. Who starts in it, and when each will answer, is known from the
clock alone, so those who start are trained at once, in one exchange, and their replies lie in wait
until the clock has come to them. Bytes are counted where a client starts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from typing_extensions import override

from fedraclora.devices.asynchronous import AsyncClock, AsyncStep
from fedraclora.devices.timeline import Load, Timeline
from fedraclora.errors import ConfigError
from fedraclora.protocol.cohorts import client_weights
from fedraclora.protocol.method import Cohort, Downlink, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.server.buffer import PREFIX, batch_of, merge, read_batches, write_batches
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.wire.changes import uploaded_bytes
from fedraclora.wire.exchange import payload_bytes


class BufferedStrategy(FedStrategy):
    """Runs a method without waiting for anyone; arguments as for `FedStrategy`."""

    divisible = False  # replies of other rounds are merged with this one's
    _leg: AsyncStep | None = None

    @override
    def open(self, round_: int) -> Exchange:
        """Advance the clock by the round, and ask those who start in it."""
        loop, draw = self.loop, self.draw
        any_ = Cohort(torch.arange(1), torch.ones(1, dtype=torch.float64))
        sent = self.method.open_round(self.state, round_, any_, draw)
        sent = self.rounding.sent(self.steps.send(sent, self.state), round_)
        self._leg = leg = self._passed(round_, sent)
        started = sorted(leg.started, key=lambda flight: flight.client)
        clients = torch.tensor([f.client for f in started], dtype=torch.int64)
        asked = Cohort(clients, client_weights(loop.weights, self.examples(clients)))
        answers = torch.tensor([not f.lost for f in started], dtype=torch.bool)
        took = torch.tensor([f.lands for f in started], dtype=torch.float64) - self.devices.now
        kept = torch.nonzero(answers).flatten()
        exchange = Exchange(
            sent,
            round_,
            self.catch_up.version,
            asked.select(answers),
            asked,
            loop,
            rate_scale=self.local.rate_scale(round_, loop.rounds),
            base=self.state.base,
            timeline=Timeline(kept, list(leg.dropped), leg.end - self.devices.now, took, []),
        )
        exchange.ask()
        return exchange

    def _passed(self, round_: int, sent: Downlink) -> AsyncStep:
        """Find who starts in a round, and who answers."""
        devices, loop = self.devices, self.loop
        up_kind, down_kind = loop.kinds

        def load(clients: torch.Tensor) -> Load:
            down = torch.full((len(clients),), payload_bytes(sent, len(clients), down_kind))
            down += torch.from_numpy(self.catch_up.missing(clients))
            up = uploaded_bytes(sent, len(clients), up_kind)
            return Load(devices.passes(self.sizes(clients)), down, up)

        batches, lost = read_batches(self.state)
        flying = (*(f for batch in batches for f in batch.flights), *lost)
        space = AsyncClock(devices.system, devices.seed, round_, loop.clients, loop.cohort, load)
        return space.fly(devices.now, flying, devices.system.buffer or 1)

    @override
    def _next(self, exchange: Exchange, got: Uplinks) -> State:
        """Merge the replies that have come; the others lie in wait."""
        leg, before = self._leg, self.state
        if leg is None:
            raise ConfigError("replies came before a round was opened")
        batches, _ = read_batches(before)
        if len(got.clients):
            batches.append(batch_of(got, exchange.downlink, before.base, leg.started))
        landed, flying = frozenset(leg.landed), frozenset(leg.flying)
        came = [part for b in batches if (part := b.select(landed)).flights]
        after = replace(before, link=None, report={}, notes=())
        if came:

            def merged(_: Uplinks) -> State:
                return merge(self.method, before, came, exchange.downlink, exchange.round_)

            after = self.steps.close(merged, before, exchange, got)
        waiting = [batch.select(flying) for batch in batches]
        lost = tuple(sorted(f for f in flying if f.lost))
        kept = {n: m for n, m in after.moments.items() if not n.startswith(PREFIX)}
        return replace(after, moments=kept | write_batches(waiting, lost, self.loop.dtype))

    @override
    def _close(self, exchange: Exchange, after: State) -> None:
        super()._close(exchange, after)
        if self._leg is not None:
            self.devices.now = self._leg.end
