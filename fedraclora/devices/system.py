"""Simulate a fleet of mixed devices on a virtual clock: availability, dropout, stragglers.

    seconds of a client =
        jitter (latency + bytes down / downlink + sample passes / speed + bytes up / uplink)

A round asks ``over_select`` times its number of clients and uses the first replies (`timeline`).
Every property of a client is a pure function of (seed, client) and, if it changes, of the round.
Nothing is stored, and the cost of a round depends on its clients only, not on the population.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Lt

from fedraclora.compatibility import Feature
from fedraclora.devices.distributions import Availability, Distribution, Diurnal, LogNormal
from fedraclora.devices.timeline import ArrivalOrder, Load, Timeline
from fedraclora.errors import ClientError
from fedraclora.limits import Count, Fraction, Limited, NotNegative, Seconds
from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.rng import cohort_uniforms, generator, hash_key

_MEGABYTE = 1e6
_TIMES = "system.speed, downlink, uplink or latency"
UNMIXED = (  # keys for which one server step uses replies of one round only
    "a method that needs each client's update",
    "a method that keeps a part of the model at each client",
    "an aggregator other than mean",
    "an attack whose clients collude",
    "secure=secagg",
    "control_variates=true",
    "rank allocation",
    "server_optimizer.space=factors",
    "clients that train different parameters",
    "clients that send gradients",
    "a method whose frozen factors recur",
)
_SEARCH = 64  # clients tried for each one wanted, before the round has fewer


@dataclass(frozen=True)
class SystemConfig(Limited, group="system"):
    """No devices: every client is available, replies at once and never fails.

    Attributes:
        speed: Training samples per virtual second; None = instant.
        downlink, uplink: Megabytes (10^6 bytes) of payload per virtual second: 0.95 of the nominal
            bandwidth, or the server's limit; None = instant.
        latency: Virtual seconds of an exchange beside transfer and training: requests, pauses,
            processes; None = none. A deployment's is measured in docs/records/slow_links.md.
        rank_budget: Share of the method's rank that a client can train; more than 1 counts as 1.
        availability: Which clients are available in a round; None = all.
        drop_out: Probability that a client drops out, at a uniform moment of its round.
        jitter: Sigma of a lognormal factor of median 1 on a client's time, drawn in each round.
        deadline: Virtual seconds after which replies are late; None = wait.
        over_select: Clients asked for each reply wanted; the first replies are used.
        buffer: Replies that a server step waits for while other clients continue
            (`fedraclora.devices.asynchronous`); None = a round waits for all its clients.
    """

    speed: Distribution | None = None
    downlink: Distribution | None = None
    uplink: Distribution | None = None
    latency: Distribution | None = None
    rank_budget: Distribution | None = None
    availability: Availability | None = None
    drop_out: Fraction = 0.0
    jitter: NotNegative = 0.0
    deadline: Seconds | None = None
    over_select: Annotated[float, Ge(1), Lt(math.inf)] = 1.0
    buffer: Count | None = None

    @property
    def enabled(self) -> bool:
        """Return whether any setting differs from ideal devices."""
        return self != IDEAL

    @property
    def timed(self) -> bool:
        """Return whether clients take virtual time."""
        paces = (self.speed, self.downlink, self.uplink, self.latency)
        return any(pace is not None for pace in paces)

    @Feature("simulated devices", instead="system=none")
    def _differs(self) -> bool:
        return self.enabled

    @Feature(
        "simulated devices with a speed or a network",
        instead="system.speed=null, system.downlink=null and system.uplink=null",
        take=f"clients that take time ({_TIMES})",
        reads=("system.jitter", "system.deadline"),
    )
    def _takes_time(self) -> bool:
        return self.timed

    @Feature("simulated devices without a speed or a network", instead=f"one of {_TIMES}")
    def _takes_no_time(self) -> bool:
        return not self.timed

    @Feature(
        "system.availability=diurnal",
        instead="another system.availability",
        avoids={
            "simulated devices without a speed or a network": (
                "the clock stands still, so the time of day never changes"
            )
        },
    )
    def _sleeps(self) -> bool:
        return isinstance(self.availability, Diurnal)

    @Feature("system.deadline", instead="system.deadline=null")
    def _ends_rounds(self) -> bool:
        return self.deadline is not None

    @Feature("system.over_select", instead="system.over_select=1")
    def _asks_more(self) -> bool:
        return self.over_select != 1

    @Feature(
        "system.buffer",
        instead="system.buffer=null",
        avoids={
            "simulated devices without a speed or a network": "all replies would come at once",
            "system.deadline": "a buffered server has no late replies",
            "system.over_select": "a buffered server uses every reply",
            "system.rank_budget": "the replies of one step must train the same parameters",
            "a method whose clients send numbers along random directions": (
                "late replies belong to the directions of another round"
            ),
            **dict.fromkeys(UNMIXED, "one server step mixes replies of several rounds"),
            "a method that merges after several rounds": (
                "late replies trained factors that have been merged since"
            ),
            "a method that starts from the factors of the last merge": (
                "late replies trained factors that have been replaced"
            ),
            "a method that has changed the shapes that it trains": (
                "late replies have other shapes"
            ),
            "a method whose next round needs more than the weights": (
                "the state beside which late replies were trained has changed"
            ),
        },
    )
    def _waits_for_nobody(self) -> bool:
        return self.buffer is not None

    @Feature(
        "system.rank_budget",
        instead="system.rank_budget=null",
        avoids={
            "a method without rank budgets": ("clients with a budget train only some components"),
            "a method without one rank for all layers": "a budget is a share of that rank",
        },
    )
    def _limits_ranks(self) -> bool:
        return self.rank_budget is not None

    def ask(self, seed: int, round_: int, population: int, cohort: int, now: float) -> torch.Tensor:
        """Draw the clients that a round asks: uniformly among the available ones.

        Clients are tried in a random order until enough are available, in searches of doubling
        size. Each search has a new order: by symmetry the result of the last one is a uniform
        sample, and all searches together cost twice the last.

        Args:
            seed: Of the run.
            round_: From 1.
            population: Number of clients.
            cohort: Replies wanted, 1 to ``population``.
            now: Virtual seconds since the run began.

        Returns:
            Ids in ascending order, int64. Fewer than ``over_select * cohort`` if no more are
            available, or no more were found among 64 times as many. Without availability and
            over-selection, the result of `fedraclora.protocol.cohorts.draw_cohort`.

        Raises:
            ClientError: If no client is available.
        """
        # Rounded first: 1.1 x 50 is 55.00000000000001.
        needed = min(population, math.ceil(round(self.over_select * cohort, 6)))
        if self.availability is None:
            return draw_cohort(seed, round_, population, needed)
        most = min(population, _SEARCH * needed)
        size = needed
        while True:
            size = min(2 * size, most)
            order = generator(seed, "system/ask", round_, size)
            looked_at = torch.from_numpy(order.choice(population, size, replace=False))
            found = looked_at[self.availability.at(seed, round_, now, looked_at)]
            if len(found) >= needed or size == most:
                break
        if not len(found):
            raise ClientError(
                f"round {round_}: none of the {most} clients looked at is available at {now:,.0f} "
                f"virtual seconds ({self.availability}); raise its chance or share, or clients"
            )
        return found[:needed].sort().values

    def timeline(
        self, seed: int, round_: int, clients: torch.Tensor, load: Load, needed: int
    ) -> Timeline:
        """Compute which clients reply in time, and how long the round takes.

        Args:
            seed: Of the run.
            round_: From 1.
            clients: The asked clients, int64 [K].
            load: The load of each.
            needed: Replies that end the round.

        Returns:
            The round on the virtual clock. Equal times are ordered at random.

        Raises:
            ClientError: If no client replies in time.
        """
        seconds, gone = self.draw_delays(seed, round_, clients, load)
        ties = torch.zeros_like(seconds)
        if len(clients) > needed:
            ties = cohort_uniforms(hash_key(seed, "system/tie", round_), clients)
        limit = math.inf if self.deadline is None else self.deadline
        return ArrivalOrder(round_, clients, seconds, gone, ties, needed, limit).run()

    def ranks(self, seed: int, clients: torch.Tensor, rank: int) -> torch.Tensor | None:
        """Draw the ranks that clients can train.

        Args:
            seed: Of the run.
            clients: Ids, int64 [K].
            rank: The method's.

        Returns:
            int64 [K] from 1 to ``rank``: the client's share of it, rounded up. None without
            budgets.
        """
        if self.rank_budget is None:
            return None
        share = self._of_device("rank_budget", self.rank_budget, seed, clients)
        # Less a tiny amount: 0.07 x 100 is 7.000000000000001.
        return torch.ceil(share * rank - 1e-9).clamp(1, rank).to(torch.int64)

    def draw_delays(
        self, seed: int, round_: int, clients: torch.Tensor, load: Load
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the seconds until starting clients reply, and until they drop out (or inf).

        Arguments as for `timeline`; float64 [K] each.
        """
        seconds = self._seconds(seed, round_, clients, load)
        never = torch.full_like(seconds, math.inf)
        if not self.drop_out:
            return seconds, never
        u = cohort_uniforms(hash_key(seed, "system/drop out", round_), clients)
        # If u is below drop_out, it is uniform up to it: u / drop_out is the moment.
        return seconds, torch.where(u < self.drop_out, seconds * (u / self.drop_out), never)

    def _seconds(self, seed: int, round_: int, clients: torch.Tensor, load: Load) -> torch.Tensor:
        """Compute the virtual seconds of each client, float64 [K]."""
        total = torch.zeros(len(clients), dtype=torch.float64)
        for name, rate, unit, amount in (
            ("downlink", self.downlink, _MEGABYTE, load.down),
            ("speed", self.speed, 1.0, load.passes),
            ("uplink", self.uplink, _MEGABYTE, load.up),
        ):
            if rate is not None:  # float64 first: a quotient of integers would be float32
                pace = unit * self._of_device(name, rate, seed, clients)
                total += amount.to(torch.float64) / pace
        if self.latency is not None:
            total += self._of_device("latency", self.latency, seed, clients)
        if self.jitter:
            u = cohort_uniforms(hash_key(seed, "system/jitter", round_), clients)
            total *= LogNormal(1.0, self.jitter).quantile(u)
        return total

    def _of_device(
        self, name: str, of: Distribution, seed: int, clients: torch.Tensor
    ) -> torch.Tensor:
        """Draw a property that clients keep for the whole run, float64 [K]."""
        return of.quantile(cohort_uniforms(hash_key(seed, f"system/{name}"), clients))


IDEAL = SystemConfig()
