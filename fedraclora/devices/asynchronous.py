"""Clients that answer when they are done: one step of the server on the virtual clock.

As many clients as a cohort train at any time. Whoever answers, or vanishes, gives its place to
another at that moment, who starts from the weights of that moment. A step of the server, a round,
ends when as many replies as the buffer holds have come; the others stay on their way.
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

_SEARCH = 64  # clients looked at for a place, beside those that train, before it stays empty


@dataclass(frozen=True, order=True)
class PendingClient:
    """A client that trains.

    Attributes:
        lands: Virtual seconds since the run began at which it answers or vanishes.
        client: Its id.
        round_: In which it started.
        lost: Whether it vanishes.
    """

    lands: float
    client: int
    round_: int
    lost: bool = False


@dataclass(frozen=True)
class AsyncStep:
    """A round: who started, whose reply came, who is on the way when it ends.

    Attributes:
        started: In the order of their start.
        landed: In the order in which they answered; as many as the buffer holds.
        flying: The others, by the time of their answer.
        dropped: Who vanished, with the reason.
        end: Virtual seconds since the run began.
    """

    started: tuple[PendingClient, ...]
    landed: tuple[PendingClient, ...]
    flying: tuple[PendingClient, ...]
    dropped: tuple[Refusal, ...]
    end: float


@dataclass(frozen=True)
class AsyncClock:
    """Who can train when, for one round.

    Attributes:
        system: What devices are like.
        seed: Of the run.
        round_: From 1.
        population: Number of clients.
        places: How many train at any time.
        load: What a client must do, for ids int64 [K].
    """

    system: SystemConfig
    seed: int
    round_: int
    population: int
    places: int
    load: Callable[[torch.Tensor], Load]

    def fly(self, now: float, flying: tuple[PendingClient, ...], needed: int) -> AsyncStep:
        """Advance the clock by a round.

        Args:
            now: Virtual seconds since the run began.
            flying: Who is on the way.
            needed: Replies that end the round.

        Returns:
            The round. Equal times are ordered by client.

        Raises:
            ClientError: If nobody is left on the way before any reply has come.
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
        """Draw who takes a free place: uniformly among those that are available and not asked."""
        size = min(self.population, _SEARCH + len(taken))
        there = self.system.availability
        rng = generator(self.seed, "system/buffer", self.round_, number)
        for drawn in rng.choice(self.population, size, replace=False).tolist():
            one = torch.tensor([drawn])
            if drawn in taken:
                continue
            if there is not None and not there.at(self.seed, self.round_, now, one)[0]:
                continue
            seconds, gone = self.system.trips(self.seed, self.round_, one, self.load(one))
            lost = bool(gone[0] <= seconds[0])
            yield PendingClient(
                now + float(gone[0] if lost else seconds[0]), drawn, self.round_, lost
            )
