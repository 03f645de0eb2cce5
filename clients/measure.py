"""Measures clients' weights on samples that they do not train on; what goes back are sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch

from fedraclora.clients.client_state import restore
from fedraclora.data.samples import ClientData, Samples, TableRows
from fedraclora.errors import WireError
from fedraclora.evaluation.clients import AFTER, ClientMeasure
from fedraclora.evaluation.summed import SummedMeasure, write_sizes
from fedraclora.protocol.method import Downlink
from fedraclora.run.client_state import ClientStore
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.standing import standing_weights
from fedraclora.tree import Layout, Tree
from fedraclora.wire.exchange import Answer, Ask, TrainRequest
from fedraclora.wire.secagg import Words

Owned = tuple[Samples, torch.Tensor]  # of one client after another, and how many of each
SMALL = "it has {} samples, of which none is held out to measure on (evaluate.share)"


class Measurer:
    """Answers asks to measure.

    Args:
        trainer: Has the task, and trains where what comes of that is measured, too.
    """

    def __init__(self, trainer: CohortTrainer) -> None:
        self.trainer, self.task = trainer, trainer.task
        self.measure = ClientMeasure.of(self.task)
        self._layout = Layout(())  # of what a client sends; known once it is wanted
        self._shared: tuple[Tree, Downlink | None, Tree] = ({}, None, {})

    def answer(self, ask: Ask, base: Tree, store: ClientStore) -> Answer:
        """Measure the clients of an ask; one without samples for that is a failure, named.

        Args:
            ask: What is asked.
            base: The base weights that they hold.
            store: What they hold besides.

        Raises:
            WireError: If the run has no such samples.
        """
        request, held, device = ask.request, self.task.held, self.trainer.device
        if held is None:
            raise WireError(
                "a message asks clients to measure, but by their config they hold no samples out: "
                "run the server and the clients under one config"
            )
        sizes = held.data.sizes(request.clients.to(device)).cpu()
        kept = torch.nonzero(sizes).flatten()
        clients, after = request.clients[kept], request.measure == "after"
        samples, counts = joined(held.data, clients.to(device), sizes[kept].to(device)), sizes[kept]
        downlink = ask.own.select(kept).beside(base)
        steps, found = torch.zeros_like(clients), Tree()
        if samples is not None:
            found = self._before(ask, downlink, base, clients, store, (samples, counts))
        if samples is not None and after:
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
            each = self._trained(base, downlink, result.trained)
            steps, own = result.steps, self._apart(each, (samples, counts))
            found |= {AFTER + name: value for name, value in own.items()}
        layout = Layout.of(found, skip=1)
        small = torch.nonzero(sizes == 0).flatten()
        whole = self.task.train.sizes(request.clients[small].to(device)).tolist()
        return Answer(
            request.round_,
            request.version,
            request.first,
            clients,
            losses=torch.zeros(len(clients), dtype=torch.float64),
            samples=sizes[kept],
            steps=steps,
            pieces=(layout.pack(found, lead=1) if found else torch.zeros(0, 0).double(),),
            failures={
                c: SMALL.format(n)
                for c, n in zip(request.clients[small].tolist(), whole, strict=True)
            },
            layout=layout,
        )

    def vectors(
        self, request: TrainRequest, answer: Answer
    ) -> tuple[dict[int, Callable[[], Words]], dict[str, Any]]:
        """Write what clients have measured as vectors for a secure sum.

        One that has no samples to measure on sends zeros: it tells nothing, and its neighbours need
        nobody to take their masks off.

        Returns:
            What gives the words of each client, by id, and what is told of them.
        """
        clients, points = request.clients, ("", AFTER) if request.measure == "after" else ("",)
        if not self._layout.shapes:
            zero = torch.zeros(1, dtype=torch.int64, device=self.trainer.device)
            one = self.task.train.gather(clients[:1].to(zero.device), zero[None])
            sent = self.measure.sent(self.task, {}, one, zero + 1, 1)
            self._layout = Layout.of(sent, skip=1)
        summed = SummedMeasure(self.measure, self._layout, points)
        came = {c: k for k, c in enumerate(answer.clients.tolist())}
        sent = answer.layout.unpack(answer.numbers)
        nothing = {
            point + n: torch.zeros(1, *shape)
            for point in points
            for n, shape in self._layout.shapes
        }

        def words(client: int) -> Words:
            k = came.get(client)
            own = nothing if k is None else {n: t[k : k + 1] for n, t in sent.items()}
            samples = torch.zeros(1) if k is None else answer.samples[k : k + 1]
            found: Words = summed.words(own, samples)[0]
            return found

        of: dict[int, Callable[[], Words]] = {c: partial(words, c) for c in clients.tolist()}
        return of, {"layout": write_sizes(self._layout)}

    def _before(
        self,
        ask: Ask,
        downlink: Downlink,
        base: Tree,
        clients: torch.Tensor,
        store: ClientStore,
        samples: Owned,
    ) -> Tree:
        """Measure the weights from which a round begins: as one batch where all have the same."""
        stays = {n for n, slot in downlink.trained().items() if not slot.upload}
        if not stays and not any(f.per_client for f in downlink.named.values()):
            known, of, weights = self._shared
            if known is not base or of is not ask.downlink:  # it serves all chunks of an exchange
                weights = self._standing(base, downlink, {})
                self._shared = base, ask.downlink, weights
            return self._sent(weights, *samples)
        owned = (store.weights_of(c, ask.request.round_) for c in clients.tolist())
        each = [
            self._standing(base, downlink.of_one(k), {n: t for n, t in own.items() if n in stays})
            for k, own in enumerate(owned)
        ]
        return self._apart(each, samples)

    def _standing(self, base: Tree, downlink: Downlink, own: Tree) -> Tree:
        return standing_weights(base, downlink, self.trainer.plan, own, self.trainer.local.scalings)

    def _trained(self, base: Tree, downlink: Downlink, trained: Tree) -> list[Tree]:
        """Compute the weights of each client from what it has trained."""
        count = len(next(iter(trained.values())))
        return [
            self._standing(base, downlink.of_one(k), {n: t[k] for n, t in trained.items()})
            for k in range(count)
        ]

    def _apart(self, each: Sequence[Tree], samples: Owned) -> Tree:
        """Measure on the samples of each client weights of its own."""
        whole, found, start = samples[0], list[Tree](), 0
        for weights, count in zip(each, samples[1].tolist(), strict=True):
            own = whole.mapped(itemgetter(slice(start, start + count)))
            found.append(self._sent(weights, own, torch.tensor([count])))
            start += count
        return {name: torch.cat([sent[name] for sent in found]) for name in found[0]}

    def _sent(self, weights: Tree, samples: Samples, counts: torch.Tensor) -> Tree:
        size = 1 if self.task.held is None else self.task.held.batch_size
        return self.measure.sent(self.task, weights, samples, counts, size)


def joined(data: ClientData, clients: torch.Tensor, sizes: torch.Tensor) -> Samples | None:
    """Put the samples of clients one after another; None of none."""
    if not len(clients):
        return None
    if isinstance(data, TableRows):  # copied once
        starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        place = torch.arange(len(starts), device=sizes.device) - starts
        rows = data.rows_at(clients.repeat_interleave(sizes), place[:, None])
        return data.samples.take(rows[:, 0])
    pairs = zip(clients.split(1), sizes.tolist(), strict=True)
    return Samples.join(
        [data.gather(one, torch.arange(n, device=one.device)[None]) for one, n in pairs]
    )
