"""Run buffered asynchronous rounds (FedBuff), on the virtual clock of the devices.

A round is a server step. The clock determines the clients that start in it, and the time of each
reply, so starting clients are trained at once, in one exchange, and their replies are kept until
the clock reaches their time. Bytes are counted when a client starts. A step merges the replies that
have arrived:

    W <- W + sum_i w_i (1 + tau_i)^(-1/2) Delta_i / sum_i w_i      over the replies of the buffer

Delta_i is the change of a client's weights since it started, tau_i the number of rounds since then,
w_i its aggregation weight. A reply belongs to the sketch under which it was trained, so replies of
one round are merged with that round's sketch: one merge for each (`Link.rest`), exact, since every
B is multiplied by its own A. Factors that keep their coordinates are merged together.

All data for later rounds are in the moments of the state, and therefore in the checkpoint.

References:
    Nguyen et al., *Federated learning with buffered asynchronous aggregation*, AISTATS 2022, arXiv
    2106.06639 (FedBuff), and FLSim, the code of its authors: its polynomial discount with exponent
    1/2, and its learning rate at 1 / sum_i w_i. Merges by sketch are ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from typing_extensions import override

from fedraclora.codec import join, split
from fedraclora.compatibility import conflict
from fedraclora.devices.asynchronous import AsyncClock, AsyncStep, PendingClient
from fedraclora.devices.system import SystemConfig
from fedraclora.devices.timeline import Load, Timeline
from fedraclora.errors import ConfigError
from fedraclora.protocol.cohorts import client_weights
from fedraclora.protocol.instructions import opening_rows
from fedraclora.protocol.method import (
    BEYOND_WEIGHTS,
    OTHER_LAYOUT,
    Cohort,
    Link,
    Method,
    RoundInstructions,
    State,
)
from fedraclora.protocol.uplinks import Uplinks, weighted_sum
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.guard import hold_to_traits
from fedraclora.tree import Tree, below
from fedraclora.wire.exchange import DTYPES

PREFIX = "buffer/"  # prefix of moments that are pending replies


class BufferedStrategy(FedStrategy):
    """Run a method without waiting for clients; arguments as for `FedStrategy`."""

    divisible = False  # replies of other rounds are merged with this round's
    _leg: AsyncStep | None = None

    @override
    def open(self, round_: int) -> Exchange:
        """Advance the clock by the round, and ask the clients that start in it."""
        any_ = Cohort(torch.arange(1), torch.ones(1, dtype=torch.float64))
        sent = self.method.open_round(self.state, round_, any_, self.draw)
        sent = self.rounding.sent(self.steps.send(sent, self.state), round_)
        self._leg = leg = self._passed(round_, sent)
        started = sorted(leg.started, key=lambda flight: flight.client)
        clients = torch.tensor([f.client for f in started], dtype=torch.int64)
        asked = Cohort(clients, client_weights(self.loop.weights, self.examples(clients)))
        answers = torch.tensor([not f.lost for f in started], dtype=torch.bool)
        took = torch.tensor([f.lands for f in started], dtype=torch.float64) - self.devices.now
        kept = torch.nonzero(answers).flatten()
        timeline = Timeline(kept, list(leg.dropped), leg.end - self.devices.now, took, [])
        return self._asked(sent, round_, asked.select(answers), asked, timeline=timeline)

    def _passed(self, round_: int, sent: RoundInstructions) -> AsyncStep:
        """Find the clients that start in a round, and those that reply."""
        devices, loop = self.devices, self.loop

        def load(clients: torch.Tensor) -> Load:
            return devices.load(clients, sent, self.sizes, self.catch_up, loop)

        waiting = read_batches(self.state)
        flying = (*(f for batch in waiting.batches for f in batch.flights), *waiting.lost)
        space = AsyncClock(devices.system, devices.seed, round_, loop.clients, loop.cohort, load)
        return space.advance_round(devices.now, flying, devices.system.buffer or 1)

    @override
    def _next(self, exchange: Exchange, uplinks: Uplinks) -> State:
        """Merge the replies that have arrived; keep the others for later rounds."""
        leg, before = self._leg, self.state
        if leg is None:
            raise ConfigError("replies came before a round was opened")
        batches = [*read_batches(before).batches]
        if len(uplinks.clients):
            batches.append(batch_of(uplinks, exchange.downlink, before.base, leg.started))
        landed, flying = frozenset(leg.landed), frozenset(leg.flying)
        landed_batches = [part for b in batches if (part := b.select(landed)).flights]
        after = replace(before, link=None, report={}, notes=())
        if landed_batches:

            def merged(_: Uplinks) -> State:
                return merge(
                    self.method, before, landed_batches, exchange.downlink, exchange.round_
                )

            after = self.steps.close(merged, before, exchange, uplinks)
        waiting = [batch.select(flying) for batch in batches]
        lost = tuple(sorted(f for f in flying if f.lost))
        kept = {n: m for n, m in after.moments.items() if not n.startswith(PREFIX)}
        return replace(after, moments=kept | write_batches(waiting, lost, self.loop.dtype))

    @override
    def _close(self, exchange: Exchange, after: State) -> None:
        super()._close(exchange, after)
        if self._leg is not None:
            self.devices.now = self._leg.end


@dataclass(frozen=True)
class ReplyBatch:
    """Hold replies to one downlink.

    Attributes:
        round_: The downlink's round.
        sent: The downlink.
        flights: The time of each client's reply, in ascending order of client.
        rows: Their changes since they started, [K, P].
        weights: Aggregation weights, float64 [K].
    """

    round_: int
    sent: RoundInstructions
    flights: tuple[PendingClient, ...]
    rows: torch.Tensor
    weights: torch.Tensor

    def select(self, flights: frozenset[PendingClient]) -> ReplyBatch:
        """Keep only these clients."""
        kept = [i for i, flight in enumerate(self.flights) if flight in flights]
        places = torch.tensor(kept, dtype=torch.int64)
        return replace(
            self,
            flights=tuple(self.flights[i] for i in kept),
            rows=self.rows[places],
            weights=self.weights[places],
        )


def batch_of(
    uplinks: Uplinks, sent: RoundInstructions, base: Tree, started: tuple[PendingClient, ...]
) -> ReplyBatch:
    """Build a batch from the replies of a round, of all clients that will reply.

    Args:
        uplinks: Their updates.
        sent: Their instructions.
        base: The base weights of their start.
        started: The clients that started in the round; those whose training failed are left out.
    """
    start = opening_rows(sent, base, uplinks.layout, torch.arange(len(uplinks.clients)))
    own = {f.client: f for f in started if not f.lost}
    flights = tuple(own[client] for client in uplinks.clients.tolist())
    rows = uplinks.rows().cpu()
    return ReplyBatch(flights[0].round_, sent, flights, rows - start.to(rows), uplinks.weights)


@dataclass(frozen=True)
class Waiting:
    """Hold pending replies: batches in ascending order of round, and clients that will drop out."""

    batches: tuple[ReplyBatch, ...] = ()
    lost: tuple[PendingClient, ...] = ()


def write_batches(batches: list[ReplyBatch], lost: tuple[PendingClient, ...], dtype: str) -> Tree:
    """Convert pending replies to tensors; batches without clients are left out.

    Args:
        batches: Batches of unfinished rounds.
        lost: Clients that will drop out.
        dtype: Type of sent numbers.
    """
    if not lost and not any(batch.flights for batch in batches):
        return {}
    sent = [replace(b.sent.to(DTYPES[dtype]), ranks=None) for b in batches]
    pairs = zip(batches, sent, strict=True)
    kept = tuple(replace(batch, sent=asked) for batch, asked in pairs if batch.flights)
    tensors, plain = split(Waiting(kept, lost), PREFIX[:-1])
    # Copied: products round by alignment, and after a resume each tensor is separate.
    tensors = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    text = json.dumps(plain).encode()
    return tensors | {f"{PREFIX}fields": torch.tensor([*text], dtype=torch.uint8)}


def read_batches(state: State) -> Waiting:
    """Read the tensors of `write_batches`."""
    stored = below(state.moments, PREFIX)
    if not stored:
        return Waiting()
    return join(Waiting, stored, json.loads(bytes(stored["fields"].tolist())))


def merge(
    method: Method, state: State, batches: list[ReplyBatch], now: RoundInstructions, round_: int
) -> State:
    """Take the step of the server.

    Args:
        method: Closes a round for each downlink.
        state: Before the step.
        batches: The arrived replies, in ascending order of round.
        now: This round's instructions: stale replies in the same coordinates are merged with it.
        round_: From 1.

    Returns:
        The next state, with one merge and the staleness in its report.

    Raises:
        ConfigError: If a stale reply cannot be merged with its own downlink.
    """
    total = float(sum(batch.weights.sum() for batch in batches))
    ages = [float(round_ - b.round_) for b in batches for _ in b.flights]
    own = [[b] for b in batches if b.sent.link != now.link]
    together = [b for b in batches if b.sent.link == now.link]
    links: list[Link] = []
    for group in [*own, *([together] if together else [])]:
        _check_late(own, state)
        sent = now if group is together else group[0].sent
        state = _closed(method, state, sent, group, total, round_)
        links.append(state.link or Link())
    _check_late(own, state)
    first, *others = links
    report = {"staleness": sum(ages) / len(ages), "staleness_max": max(ages)}
    return replace(
        state, link=replace(first, rest=tuple(others)), report={"merged": float(len(ages))} | report
    )


def _check_late(late: list[list[ReplyBatch]], state: State) -> None:
    """Reject replies to older downlinks if these depended on more than the weights."""
    if late and state.depends_on_past:
        raise conflict(SystemConfig, BEYOND_WEIGHTS)


def _closed(
    method: Method,
    state: State,
    sent: RoundInstructions,
    group: list[ReplyBatch],
    total: float,
    round_: int,
) -> State:
    """Close a round for replies in the same coordinates: start + their discounted changes."""
    layout = sent.layout
    if any(batch.sent.layout != layout for batch in group):
        raise conflict(SystemConfig, OTHER_LAYOUT)
    rows = torch.cat([batch.rows for batch in group])
    late = torch.cat([torch.full((len(b.flights),), float(round_ - b.round_)) for b in group])
    weights = torch.cat([batch.weights for batch in group]) / (1 + late.double()).sqrt()
    start = opening_rows(sent, state.base, layout, torch.arange(1))
    clients = torch.tensor([f.client for b in group for f in b.flights])
    mean = start + weighted_sum(rows, weights) / total
    uplinks = Uplinks(clients, weights, layout, summed=mean, denominator=1.0)
    return hold_to_traits(method, state, method.close_round(state, sent, uplinks), sent)
