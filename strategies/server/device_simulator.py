"""Simulate the devices of clients: sampled clients, stragglers, and the time of a round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedraclora.devices.system import SystemConfig
from fedraclora.devices.timeline import Load, Timeline
from fedraclora.protocol.method import Cohort, Method, RoundInstructions
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.training.localconfig import LocalConfig
from fedraclora.weights.chain import CatchUp
from fedraclora.wire.changes import uploaded_bytes
from fedraclora.wire.exchange import payload_bytes


@dataclass
class DeviceSimulator:
    """Simulate a fleet of devices on the virtual clock of one run.

    Stragglers and dropouts are known before training, so only clients whose replies are used are
    trained; the bytes sent to the others are counted. Time depends on bytes without coding, since
    stragglers must not depend on the version of a coder.

    Attributes:
        system: Settings of the devices.
        seed: The seed of the run.
        local: Local settings, for the sample passes of a client.
        now: Virtual seconds since the run began.
    """

    system: SystemConfig
    seed: int
    local: LocalConfig
    now: float = 0.0

    @property
    def clock(self) -> dict[str, object]:
        """Return virtual seconds since the run began, as a column of the ledger; {} if ideal."""
        return {"virtual_seconds": self.now} if self.system.timed else {}

    def ranks(self, clients: torch.Tensor, method: Method) -> torch.Tensor | None:
        """Draw the rank budgets of clients, int64 [K], or None."""
        if self.system.rank_budget is None:
            return None
        return self.system.ranks(self.seed, clients, method.rank)

    def race(
        self,
        round_: int,
        asked: Cohort,
        downlink: RoundInstructions,
        sizes: Callable[[torch.Tensor], torch.Tensor],
        catch_up: CatchUp | None,
        loop: LoopConfig,
    ) -> tuple[Cohort, RoundInstructions, Timeline | None]:
        """Compute which replies will be used, and advance the clock.

        Args:
            round_: From 1.
            asked: The asked clients.
            downlink: The instructions.
            sizes: Returns the samples of each client, int64 [K].
            catch_up: Computes what each must fetch first; None in a later exchange of a round,
                which waits for all asked clients.
            loop: Settings of the round loop.

        Returns:
            The clients that reply in time with their part of the downlink, and the exchange on the
            clock; all clients and None for ideal devices.
        """
        if not self.system.enabled:
            return asked, downlink, None
        load = self.load(asked.clients, downlink, sizes, catch_up, loop)
        needed = len(asked) if catch_up is None else loop.cohort
        timeline = self.system.timeline(self.seed, round_, asked.clients, load, needed)
        self.now += timeline.seconds
        if len(timeline.kept) == len(asked):
            return asked, downlink, timeline
        chosen = torch.zeros(len(asked), dtype=torch.bool)
        chosen[timeline.kept] = True
        return asked.select(chosen), downlink.select(timeline.kept), timeline

    def load(
        self,
        clients: torch.Tensor,
        downlink: RoundInstructions,
        sizes: Callable[[torch.Tensor], torch.Tensor],
        catch_up: CatchUp | None,
        loop: LoopConfig,
    ) -> Load:
        """Compute the work of clients (ids, int64 [K]); arguments as for `race`."""
        (up, down), count = loop.kinds, len(clients)
        fetched = torch.full((count,), payload_bytes(downlink, count, down))
        if catch_up is not None:
            fetched += torch.from_numpy(catch_up.missing(clients, coded=False))
        sent = uploaded_bytes(downlink, count, up)
        return Load(
            self.passes(sizes(clients), downlink.program.most_steps(downlink)), fetched, sent
        )

    def passes(self, sizes: torch.Tensor, most: int | None = None) -> torch.Tensor:
        """Count the sample passes of clients in a round, int64 [K].

        Args:
            sizes: Samples of each, int64 [K].
            most: The largest number of local steps, if there is one.
        """
        local = self.local
        batch = sizes if not local.batch_size else sizes.clamp(max=local.batch_size)
        # The last batch of an epoch may be short.
        in_epoch = ((sizes + batch - 1) // batch.clamp(min=1)).clamp(min=1)
        steps = local.epochs * in_epoch
        if local.steps is not None:
            steps = torch.full_like(steps, local.steps)
        steps = steps if most is None else steps.clamp(max=most)
        return steps // in_epoch * sizes + steps % in_epoch * batch
