"""Serves train messages: trains the clients that a message names, and finds who failed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import torch
from flwr.app import RecordDict

from fedraclora.clientstore import ClientStore
from fedraclora.cohort import CohortTrainer, Trial
from fedraclora.errors import ConfigError, ModelError
from fedraclora.method import Adapter, Downlink, Factor, Frozen, Trained
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
            trial, failure = None, ""
            try:
                trial = self.trainer.train(
                    base,
                    part,
                    order.clients[index],
                    round_=order.round_,
                    rate_scale=order.rate_scale,
                )
            except (ConfigError, ModelError):  # nobody's fault but the run's
                raise
            except Exception as error:  # whatever a model or data set raises is the client's
                failure = f"{type(error).__name__}: {error}"
                log.warning("round %d: clients failed", order.round_, exc_info=True)
            # Out of the handler: the error's traceback would keep the attempt's memory alive.
            if trial is not None:
                self._keep(part, order, order.clients[index], trial)
                outcome.places += places
                outcome.trials.append(trial)
            elif len(places) > 1:
                outcome.cut = True
                attempt(places[: len(places) // 2])
                attempt(places[len(places) // 2 :])
            else:
                outcome.failures[int(order.clients[places[0]])] = failure

        attempt(list(range(len(order.clients))))
        return self._reply(downlink, order, outcome)

    def _with_own(self, downlink: Downlink, order: Order, base: Tree) -> Downlink:
        """Start what stays at the clients from what each of them holds."""
        kept = {n: s for n, s in downlink.trained().items() if not s.upload}
        if not kept:
            return downlink
        dtype = next(iter(base.values())).dtype
        default = {
            n: base.get(n, torch.zeros(s.shape, dtype=dtype)) if s.start is None else s.start
            for n, s in kept.items()
        }
        own = self.store.read(order.clients, order.round_, default)

        def start(name: str, factor: Factor) -> Factor:
            kept = isinstance(factor, Trained) and name in own
            return replace(factor, start=own[name]) if kept else factor  # type: ignore[arg-type]

        adapters = {
            w: Adapter({k: start(f"{w}/{k}", f) for k, f in a.factors.items()}, a.scale)
            for w, a in downlink.adapters.items()
        }
        dense = {n: replace(s, start=own.get(n, s.start)) for n, s in downlink.dense.items()}
        return replace(downlink, adapters=adapters, dense=dense)

    def _keep(self, downlink: Downlink, order: Order, clients: torch.Tensor, trial: Trial) -> None:
        """Keep what stays; a client that diverged keeps what it had before."""
        kept = {n: trial.trained[n].cpu() for n, s in downlink.trained().items() if not s.upload}
        if not kept:
            return
        sound = torch.isfinite(trial.losses)
        for tensor in kept.values():
            sound &= torch.isfinite(tensor.flatten(1)).all(dim=1)
        if sound.any():
            self.store.stage(clients[sound], order.round_, {n: t[sound] for n, t in kept.items()})

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
