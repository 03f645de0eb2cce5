"""Federated evaluation: measure clients' weights on held-out samples, and return sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from fedraclora.clients.client_state import restore
from fedraclora.data.samples import Samples
from fedraclora.errors import WireError
from fedraclora.evaluation.clients import SummedMeasure, sums_of, write_sizes
from fedraclora.evaluation.metrics import AFTER, Measure
from fedraclora.protocol.method import RoundInstructions
from fedraclora.run.client_state import ClientStore
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.materialize import current_weights
from fedraclora.tree import Layout, Tree
from fedraclora.wire.answers import MeasuredAnswer
from fedraclora.wire.exchange import Ask, TrainRequest
from fedraclora.wire.secagg import Words

Owned = tuple[Samples, torch.Tensor]  # samples of one client after another, and their numbers
SMALL = "it has {} samples and holds none out for evaluation (evaluate.share)"


class Measurer:
    """Answer requests to evaluate.

    Args:
        trainer: Has the task, and trains if weights are also measured after local training.
    """

    def __init__(self, trainer: CohortTrainer) -> None:
        self.trainer, self.task = trainer, trainer.task
        self.measure = Measure.of_task(self.task)
        self._layout = Layout(())  # names of the sent values, known once needed
        self._shared: tuple[Tree, RoundInstructions | None, Tree] = ({}, None, {})

    def answer(self, ask: Ask, base: Tree, store: ClientStore) -> MeasuredAnswer:
        """Evaluate the clients of a request; a client without held-out samples is a failure.

        Args:
            ask: The request.
            base: Their base weights.
            store: Their state.

        Raises:
            WireError: If the run has no such samples.
        """
        request, held, device = ask.request, self.task.held, self.trainer.device
        if held is None:
            raise WireError(
                "the server asks clients to evaluate, but by their config they hold out no "
                "samples. Run the server and the clients under one config"
            )
        sizes = held.data.sizes(request.clients.to(device)).cpu()
        kept, small = torch.nonzero(sizes).flatten(), request.clients[sizes == 0]
        clients, counts = request.clients[kept], sizes[kept]
        steps, layout, numbers = torch.zeros_like(clients), Layout(()), torch.zeros(0, 0).double()
        if len(clients):
            samples = held.data.samples_of(clients.to(device)), counts
            downlink = ask.own.select(kept).with_past(base)
            found = self._before(ask, downlink, base, clients, store, samples)
            if request.measure == "after":
                asked = replace(request, clients=clients)
                downlink, moments, _ = restore(store, downlink, asked, base, self.trainer.local)
                result = self.trainer.train(
                    base,
                    downlink,
                    clients,
                    round_=request.round_,
                    rate_scale=request.rate_scale,
                    moments=moments,
                )
                steps, trained = result.steps, result.trained.items()
                each = ({n: t[k] for n, t in trained} for k in range(len(clients)))
                own = self._apart(base, downlink, each, samples)
                found |= {AFTER + name: value for name, value in own.items()}
            layout = Layout.of(found, skip=1)
            numbers = layout.pack(found, lead=1)
        whole = self.task.train.sizes(small.to(device)).tolist()
        return MeasuredAnswer(
            round_=request.round_,
            version=request.version,
            first=request.first,
            clients=clients,
            samples=counts,
            steps=steps,
            pieces=(numbers,),
            failures={c: SMALL.format(n) for c, n in zip(small.tolist(), whole, strict=True)},
            layout=layout,
        )

    def holding(self, clients: torch.Tensor) -> list[int]:
        """Return the clients that have held-out samples."""
        if self.task.held is None:
            return []
        sizes = self.task.held.data.sizes(clients.to(self.trainer.device)).cpu()
        return clients[sizes > 0].tolist()

    def vectors(
        self, request: TrainRequest, answer: MeasuredAnswer
    ) -> tuple[dict[int, Callable[[], Words]], dict[str, Any]]:
        """Encode the metrics of clients as vectors for secure aggregation.

        A client without samples sends zeros: it reveals nothing, and its neighbours' masks need not
        be removed.

        Returns:
            A function that returns each client's words, by id, and their description.
        """
        clients, points = request.clients, ("", AFTER) if request.measure == "after" else ("",)
        if not self._layout.shapes:
            zero = torch.zeros(1, dtype=torch.int64, device=self.trainer.device)
            one = self.task.train.gather(clients[:1].to(zero.device), zero[None])
            self._layout = Layout.of(self._sent({}, one, zero + 1), skip=1)
        summed = SummedMeasure(self.measure, self._layout, points)
        places = {c: k for k, c in enumerate(answer.clients.tolist())}
        sent = answer.layout.unpack(answer.numbers)

        def words(client: int) -> Words:
            if (k := places.get(client)) is None:
                return np.zeros(summed.size, dtype=np.uint32)
            own = {n: t[k : k + 1] for n, t in sent.items()}
            found: Words = summed.words(own, answer.samples[k : k + 1])[0]
            return found

        of: dict[int, Callable[[], Words]] = {c: partial(words, c) for c in clients.tolist()}
        return of, {"layout": write_sizes(self._layout)}

    def _before(
        self,
        ask: Ask,
        downlink: RoundInstructions,
        base: Tree,
        clients: torch.Tensor,
        store: ClientStore,
        samples: Owned,
    ) -> Tree:
        """Measure the weights at the start of a round; in one batch if all clients share them."""
        stays = {n for n, slot in downlink.trained().items() if not slot.upload}
        if not stays and not any(f.per_client for f in downlink.named.values()):
            known, of, weights = self._shared
            if known is not base or of is not ask.downlink:  # serves all chunks of an exchange
                weights = self._current_weights(base, downlink, {})
                self._shared = base, ask.downlink, weights
            return self._sent(weights, *samples)
        owned = (store.weights_of(c, ask.request.round_) for c in clients.tolist())
        each = ({n: t for n, t in own.items() if n in stays} for own in owned)
        return self._apart(base, downlink, each, samples)

    def _current_weights(self, base: Tree, downlink: RoundInstructions, own: Tree) -> Tree:
        return current_weights(base, downlink, self.trainer.plan, own)

    def _apart(
        self, base: Tree, downlink: RoundInstructions, each: Iterable[Tree], samples: Owned
    ) -> Tree:
        """Measure weights with personal values on the samples of each client."""
        (whole, counts), found, end = samples, list[Tree](), 0
        for k, (own, count) in enumerate(zip(each, counts.tolist(), strict=True)):
            start, end = end, end + count
            weights = self._current_weights(base, downlink.of_one(k), own)
            mine = whole.mapped(itemgetter(slice(start, end)))
            found.append(self._sent(weights, mine, torch.tensor([count])))
        return {name: torch.cat([sent[name] for sent in found]) for name in found[0]}

    def _sent(self, weights: Tree, samples: Samples, counts: torch.Tensor) -> Tree:
        size = 1 if self.task.held is None else self.task.held.batch_size
        return sums_of(self.measure, self.task, weights, samples, counts, size)
