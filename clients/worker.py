"""Serves train messages: trains the clients that a message names, and finds who failed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import torch
from flwr.app import RecordDict

from fedraclora.clientstore import ClientStore
from fedraclora.cohort import CohortTrainer, Trial
from fedraclora.method import Adapter, Downlink, Frozen, Trained
from fedraclora.replica import Replica
from fedraclora.tree import Tree
from fedraclora.wire import Order, pack_trial, unpack_downlink, uplink_layout

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """Trials of the parts of a chunk that succeeded, and the clients that failed."""

    places: list[int] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    cut: bool = False


class Worker:
    """Trains clients on one replica.

    Args:
        trainer: Trains a chunk as one batch.
        replica: The base weights.
        store: What its clients keep between rounds.
    """

    def __init__(
        self, trainer: CohortTrainer, replica: Replica, store: ClientStore | None = None
    ) -> None:
        self.trainer, self.replica = trainer, replica
        self.store = ClientStore() if store is None else store

    def train(self, content: RecordDict) -> RecordDict:
        """Answer one train message.

        A chunk that raises is cut in halves until the clients at fault stand alone: they are
        reported by id, the others' results are used.
        """
        downlink, order = unpack_downlink(content)
        base = self.replica.at(order.version, order.round_)
        downlink = self._with_own(downlink, order, base)
        outcome = Outcome()

        def attempt(places: list[int]) -> None:
            index = torch.tensor(places)
            part = cut(downlink, index) if len(places) < len(order.clients) else downlink
            try:
                trial = self.trainer.train(
                    base,
                    part,
                    order.clients[index],
                    round_=order.round_,
                    factor=order.factor,
                )
            except Exception as error:  # whatever a model or data set raises is the client's
                if len(places) > 1:
                    outcome.cut = True
                    attempt(places[: len(places) // 2])
                    attempt(places[len(places) // 2 :])
                    return
                client = int(order.clients[places[0]])
                log.warning("round %d: client %d failed", order.round_, client, exc_info=True)
                outcome.failures[client] = f"{type(error).__name__}: {error}"
                return
            self._keep(part, order, order.clients[index], trial)
            outcome.places += places
            outcome.trials.append(trial)

        attempt(list(range(len(order.clients))))
        return self._reply(downlink, order, outcome)

    def _with_own(self, downlink: Downlink, order: Order, base: Tree) -> Downlink:
        """Start what stays at the clients from what each of them holds."""
        kept = {n: s for n, s in downlink.dense.items() if not s.upload}
        if not kept:
            return downlink
        default = {n: base[n] if s.start is None else s.start for n, s in kept.items()}
        own = self.store.read(order.clients, order.round_, default)
        started = {n: replace(slot, start=own[n]) for n, slot in kept.items()}
        return replace(downlink, dense=downlink.dense | started)

    def _keep(self, downlink: Downlink, order: Order, clients: torch.Tensor, trial: Trial) -> None:
        kept = {n: trial.trained[n] for n, s in downlink.dense.items() if not s.upload}
        if kept:
            self.store.stage(clients, order.round_, kept)

    @staticmethod
    def _reply(downlink: Downlink, order: Order, outcome: Outcome) -> RecordDict:
        clients = order.clients[torch.tensor(outcome.places, dtype=torch.int64)]
        notes = []
        if outcome.cut:
            notes.append(f"round {order.round_}: a chunk was cut because clients failed in it")
        return pack_trial(
            join(outcome.trials), order, clients, uplink_layout(downlink), outcome.failures, notes
        )


def join(trials: list[Trial]) -> Trial | None:
    """Put the trials of a chunk's parts together, in order."""
    if len(trials) < 2:
        return trials[0] if trials else None
    return Trial(
        {name: torch.cat([t.trained[name] for t in trials]) for name in trials[0].trained},
        torch.cat([t.losses for t in trials]),
        torch.cat([t.steps for t in trials]),
        torch.cat([t.samples for t in trials]),
    )


def cut(downlink: Downlink, places: torch.Tensor) -> Downlink:
    """Keep the per-client values of the clients at ``places`` only."""

    def part(factor: object) -> object:
        if isinstance(factor, Frozen) and factor.per_client:
            return Frozen(factor.value[places])
        if isinstance(factor, Trained) and factor.per_client and factor.start is not None:
            return replace(factor, start=factor.start[places])
        return factor

    adapters = {
        w: Adapter({k: part(f) for k, f in a.factors.items()}, a.scale)  # type: ignore[misc]
        for w, a in downlink.adapters.items()
    }
    dense = {n: part(s) for n, s in downlink.dense.items()}
    return replace(downlink, adapters=adapters, dense=dense)  # type: ignore[arg-type]
