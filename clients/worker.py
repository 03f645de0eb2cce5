"""Serves train messages: trains the clients that a message names, and finds who failed."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from flwr.app import RecordDict

from clients.kept import held, keep
from clients.secure import answer_stage, masked_reply
from fedraclora.clientstore import ClientStore
from fedraclora.downlink import opening_rows
from fedraclora.errors import OF_THE_RUN, ConfigError, WireError
from fedraclora.method import Downlink
from fedraclora.privacy.secagg import Terms
from fedraclora.ranks import uploaded_mask
from fedraclora.replica import Replica
from fedraclora.robust.statistics import shortened
from fedraclora.sampling import client_weights
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.memory import is_out_of_memory
from fedraclora.training.trial import Trial, join
from fedraclora.tree import Layout, Tree
from fedraclora.wire import Order, Reader, clients_of, pack_trial, uplink_layout
from fedraclora.wire.secagg import Stage, read_stage

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """Trials of the parts of a chunk that succeeded, and the clients that failed.

    Attributes:
        hidden: Whether what they send is rounded and masked, and only then known to be sent.
    """

    hidden: bool = False
    places: list[int] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def parts(self) -> Iterator[tuple[list[int], Trial]]:
        """Give each trial with the places of its clients."""
        start = 0
        for trial in self.trials:
            end = start + len(trial.losses)
            yield self.places[start:end], trial
            start = end

    def note(self, text: str) -> None:
        """Add a sentence for the ledger, once."""
        if text not in self.notes:
            self.notes.append(text)


class Worker:
    """Trains clients on one replica.

    Args:
        trainer: Trains a chunk as one batch.
        replica: The base weights.
        store: What its clients keep between rounds.
        terms: What its clients insist on in secure aggregation; None: the run has none.

    Attributes:
        limit: The most clients a batch may hold, once memory ran out with more; None before.
    """

    def __init__(
        self,
        trainer: CohortTrainer,
        replica: Replica,
        store: ClientStore | None = None,
        terms: Terms | None = None,
    ) -> None:
        self.trainer, self.replica, self.terms = trainer, replica, terms
        self.store = ClientStore() if store is None else store
        self.limit: int | None = None
        self._reader = Reader()

    def train(self, content: RecordDict) -> RecordDict:
        """Answer one train message.

        A chunk that raises is cut in halves until the clients at fault stand alone: they are
        reported by id, the others' results are used. Where memory runs out nobody is at fault:
        batches hold half as many clients from there on.

        Raises:
            WireError: If a run with secure aggregation is asked for more than sums, or the other
                way round.
        """
        stage = read_stage(content)
        if (stage is None) != (self.terms is None):
            raise WireError(
                "the config of this run and its messages differ on secure aggregation: updates "
                f"are{'' if self.terms else ' not'} to be masked, and this message asks otherwise"
            )
        if stage is not None and self.terms is not None and stage.name != "masked":
            return answer_stage(content, stage, self.store, self.terms)
        downlink, order = self._reader.read(content)
        base = self.replica.at(order.version, order.round_)
        downlink, moments = held(self.store, downlink, order, base, self.trainer.local)
        outcome = Outcome(hidden=stage is not None)
        waiting = [list(range(len(order.clients)))]
        while waiting:
            places = waiting.pop()
            again = parts(places, self.limit)
            if len(again) == 1:
                again = self._attempt(base, downlink, order, places, outcome, moments)
            waiting += reversed(again)
        if stage is not None and self.terms is not None:
            return self._masked(base, downlink, order, outcome, stage, self.terms)
        return self._reply(downlink, order, outcome)

    def _attempt(
        self,
        base: Tree,
        downlink: Downlink,
        order: Order,
        places: list[int],
        outcome: Outcome,
        moments: Tree,
    ) -> list[list[int]]:
        """Train the clients at ``places`` as one batch; give the parts that must be tried again."""
        index = torch.tensor(places)
        part = downlink.select(index) if len(places) < len(order.clients) else downlink
        trial, failure, starved = None, "", False
        try:
            trial = self.trainer.train(
                base,
                part,
                order.clients[index],
                round_=order.round_,
                rate_scale=order.rate_scale,
                moments={n: t[index] for n, t in moments.items()},
            )
        except OF_THE_RUN:
            raise
        except Exception as error:  # whatever a model or data set raises is the client's
            failure, starved = f"{type(error).__name__}: {error}", is_out_of_memory(error)
            if not starved:
                log.warning("round %d: clients failed", order.round_, exc_info=True)
        # Out of the handler: the error's traceback would keep the attempt's memory alive.
        if trial is not None:
            local = self.trainer.local
            if order.clip is not None:  # first: what clients keep is what they send
                trial = within(order.clip, trial, part, base)
            if not outcome.hidden:
                keep(self.store, part, order, order.clients[index], trial, base, local)
            if local.dp is not None:  # no noise covers a loss: it stays at home
                trial = replace(trial, losses=torch.zeros_like(trial.losses))
            outcome.places += places
            outcome.trials.append(trial)
            return []
        if starved:
            return self._shrink(order, places, outcome, failure)
        if len(places) == 1:
            outcome.failures[int(order.clients[places[0]])] = failure
            return []
        outcome.note(f"round {order.round_}: a chunk was cut because clients failed in it")
        return parts(places, -(-len(places) // 2))

    def _shrink(
        self, order: Order, places: list[int], outcome: Outcome, failure: str
    ) -> list[list[int]]:
        """Halve the largest batch, for the rest of the run, and cut these clients to it.

        Raises:
            ConfigError: If a single client is too many.
        """
        gc.collect()
        torch.cuda.empty_cache()
        if len(places) == 1:
            raise ConfigError(
                f"round {order.round_}: client {int(order.clients[places[0]])} alone needs more "
                f"memory than there is ({failure}); lower local.batch_size, the size of a sample "
                "(data.max_length) or the model, or set precision=bf16-mixed"
            )
        self.limit = len(places) // 2
        text = (
            f"round {order.round_}: out of memory with {len(places)} clients a batch; "
            f"{self.limit} from here on; bits may differ from a run without"
        )
        log.warning("%s (%s)", text, failure)
        outcome.note(text)
        return parts(places, self.limit)

    def _masked(
        self,
        base: Tree,
        downlink: Downlink,
        order: Order,
        outcome: Outcome,
        stage: Stage,
        terms: Terms,
    ) -> RecordDict:
        """Hide what clients send from everyone; see `clients.secure`."""
        places, layout = torch.tensor(outcome.places, dtype=torch.int64), uplink_layout(downlink)
        updates, weights = torch.zeros(0, layout.size).double(), torch.zeros(0).double()
        if (trial := join(outcome.trials)) is not None:
            rows = sent_rows(trial, layout)
            updates = rows - opening_rows(downlink, base, layout, places)
            weights = client_weights(terms.weights, trial.samples)
        trained = (order.clients[places], updates, weights)
        store, failures, notes = self.store, outcome.failures, outcome.notes
        reply = masked_reply(order, stage, store, terms, trained, failures, notes)
        sent, step = torch.tensor(clients_of(reply), dtype=torch.int64), stage.settings["step"]
        for part_places, trial in outcome.parts():
            index = torch.tensor(part_places)
            part = downlink.select(index)
            kept = torch.isin(order.clients[index], sent)
            words = in_steps(float(step), weights[torch.isin(places, index)], trial, part, base)
            clients, local = order.clients[index], self.trainer.local
            keep(self.store, part, order, clients, words, base, local, among=kept)
        return reply

    @staticmethod
    def _reply(downlink: Downlink, order: Order, outcome: Outcome) -> RecordDict:
        places = torch.tensor(outcome.places, dtype=torch.int64)
        return pack_trial(
            join(outcome.trials),
            order,
            order.clients[places],
            uplink_layout(downlink),
            outcome.failures,
            outcome.notes,
            uploaded_mask(downlink, places) if order.reduce is None else None,
        )


def sent_rows(trial: Trial, layout: Layout) -> torch.Tensor:
    """Give what clients send as rows, float64 [k, P]."""
    return layout.pack({n: trial.trained[n].cpu().double() for n, _ in layout.shapes}, lead=1)


def in_steps(
    step: float, weights: torch.Tensor, trial: Trial, downlink: Downlink, base: Tree
) -> Trial:
    """Round what clients send as secure aggregation does: weighted updates to whole steps."""
    rows = sent_rows(trial, layout := uplink_layout(downlink))
    start = opening_rows(downlink, base, layout, torch.arange(len(rows)))
    each = weights[:, None]
    rounded = layout.unpack(start + torch.round((rows - start) * each / step) * step / each)
    sent = {name: tensor.to(trial.trained[name]) for name, tensor in rounded.items()}
    return replace(trial, trained=trial.trained | sent)


def within(clip: float, trial: Trial, downlink: Downlink, base: Tree) -> Trial:
    """Shorten what clients send to updates of norm ``clip``, over all that each of them sends."""
    layout = uplink_layout(downlink)
    rows = sent_rows(trial, layout)
    start = opening_rows(downlink, base, layout, torch.arange(len(rows)))
    short = layout.unpack(shortened(rows, start, clip))
    sent = {name: tensor.to(trial.trained[name]) for name, tensor in short.items()}
    return replace(trial, trained=trial.trained | sent)


def parts(places: list[int], size: int | None) -> list[list[int]]:
    """Cut a list into parts of at most ``size`` places; None: one part."""
    step = size or len(places)
    return [places[i : i + step] for i in range(0, len(places), step)]
