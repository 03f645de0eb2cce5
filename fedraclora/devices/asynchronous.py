"""Advance asynchronous training on the virtual clock by one server step.

A fixed number of clients (clients_per_round) trains at any time. When a client replies or drops
out, another one starts at that moment, from the weights of that moment. A server step, a round,
ends when the buffer is full of replies; the other clients continue.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fedraclora.devices.system import SystemConfig
from fedraclora.devices.timeline import REASONS, Load
from fedraclora.errors import ClientError
from fedraclora.protocol.uplinks import Refusal
from fedraclora.rng import generator

_SEARCH = 64  # clients tried for a free place, beside those that train, before it stays empty


@dataclass(frozen=True, order=True)
class PendingClient:
    """Hold a client in training.

    Attributes:
        lands: Virtual seconds from the run's start to its reply or dropout.
        client: Its id.
        round_: The round in which it started.
        lost: Whether it drops out.
    """

    lands: float
    client: int
    round_: int
    lost: bool = False


@dataclass(frozen=True)
class AsyncStep:
    """Hold the result of a server step: clients that started, replied, dropped out or continue.

    Attributes:
        started: In the order of their start.
        landed: In the order of their replies; as many as the buffer holds.
        flying: Clients still in training, by the time of their reply.
        dropped: Clients that dropped out, with the reason.
        end: Virtual seconds since the run began.
    """

    started: tuple[PendingClient, ...]
    landed: tuple[PendingClient, ...]
    flying: tuple[PendingClient, ...]
    dropped: tuple[Refusal, ...]
    end: float


@dataclass(frozen=True)
class AsyncClock:
    """Advance the virtual clock by one round of asynchronous training.

    Attributes:
        system: Settings of the devices.
        seed: Of the run.
        round_: From 1.
        population: Number of clients.
        places: Clients that train at any time.
        load: Computes the load of clients, from ids int64 [K].
    """

    system: SystemConfig
    seed: int
    round_: int
    population: int
    places: int
    load: Callable[[torch.Tensor], Load]

    def advance_round(
        self, now: float, flying: tuple[PendingClient, ...], needed: int
    ) -> AsyncStep:
        """Advance the clock by a round.

        Args:
            now: Virtual seconds since the run began.
            flying: Clients in training.
            needed: Replies that end the round.

        Returns:
            The round. Equal times are ordered by client.

        Raises:
            ClientError: If no client is left in training before any reply.
        """
        heap, asked = list(flying), 0
        heapq.heapify(heap)
        started: list[PendingClient] = []
        landed: list[PendingClient] = []
        dropped: list[Refusal] = []
        free = self.places - len(heap)
        while len(landed) < needed:
            for _ in range(free):
                asked += 1
                taken = {f.client for f in (*heap, *started)}
                flight = next(self._starts(asked, now, taken), None)
                if flight is not None:
                    started.append(flight)
                    heapq.heappush(heap, flight)
            if not heap:
                break
            flight, free = heapq.heappop(heap), self.places - len(heap)
            now = max(now, flight.lands)
            if flight.lost:
                reason = f"{REASONS[0]} on its way since round {flight.round_}"
                dropped.append(Refusal(flight.client, reason))
            else:
                landed.append(flight)
        if not landed:
            raise ClientError(
                f"round {self.round_}: no client is available and none is on its way; raise "
                "system.availability or clients"
            )
        return AsyncStep(tuple(started), tuple(landed), tuple(sorted(heap)), tuple(dropped), now)

    def _starts(self, number: int, now: float, taken: set[int]) -> Iterator[PendingClient]:
        """Draw clients for free places: uniformly among the available ones that do not train."""
        size = min(self.population, _SEARCH + len(taken))
        there = self.system.availability
        rng = generator(self.seed, "system/buffer", self.round_, number)
        for drawn in rng.choice(self.population, size, replace=False).tolist():
            one = torch.tensor([drawn])
            if drawn in taken:
                continue
            if there is not None and not there.at(self.seed, self.round_, now, one)[0]:
                continue
            seconds, gone = self.system.draw_delays(self.seed, self.round_, one, self.load(one))
            lost = bool(gone[0] <= seconds[0])
            yield PendingClient(
                now + float(gone[0] if lost else seconds[0]), drawn, self.round_, lost
            )
