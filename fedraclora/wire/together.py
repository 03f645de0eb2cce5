"""Asks of several clients as one message, and their answers as one reply: joined, and apart again.

Clients of one node need not stand in a row of the cohort; those that stand in one of its chunks are
trained as one batch, as ``engine=vectorised`` trains the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedraclora.errors import WireError
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.quantised import FULL
from fedraclora.protocol.rank_budgets import uploaded_numbers
from fedraclora.tree import difference, join_columns
from fedraclora.wire.changes import uploaded_bytes
from fedraclora.wire.exchange import Answer, Ask, NoAnswer, Stage, sent_tensors
from fedraclora.wire.fields import MANY, printable, shown

Answered = tuple[Ask, Answer | NoAnswer]


def join_asks(asks: Sequence[Ask]) -> Ask:
    """Ask the clients of several asks, which differ in nothing else, by one; in their order."""
    first, *more = asks
    if not more:
        return first
    order = torch.cat([ask.request.order for ask in asks])
    clients = torch.cat([ask.request.clients for ask in asks])
    said = {c: told for ask in asks if ask.stage for c, told in ask.stage.data.items()}
    stage = None if first.stage is None else replace(first.stage, data=said)
    return replace(_asking(first, clients, order), stage=stage)


def part_of(ask: Ask, index: torch.Tensor) -> Ask:
    """Ask some of an ask's clients, int64 places among these; what it sends is theirs alone."""
    request, downlink, stage = ask.request, ask.downlink, ask.stage
    if len(index) == len(request.clients):
        return ask
    clients = request.clients[index]
    if downlink is not None and (
        downlink.ranks is not None or any(own for _, own in sent_tensors(downlink).values())
    ):
        downlink = downlink.select(index)
    if stage is not None:
        stage = replace(stage, data={c: stage.data[c] for c in clients.tolist() if c in stage.data})
    found = _asking(ask, clients, request.order[index])
    return replace(found, downlink=downlink, stage=stage)


def _asking(ask: Ask, clients: torch.Tensor, order: torch.Tensor) -> Ask:
    first = int(order[0])
    in_a_row = int(order[-1]) - first + 1 == len(order)
    places = None if in_a_row else order
    return replace(ask, request=replace(ask.request, clients=clients, first=first, places=places))


def chunks_of(ask: Ask, size: int) -> list[Ask]:
    """Cut an ask where a chunk of ``size`` clients of the cohort ends."""
    ends = torch.nonzero((ask.request.order // size).diff()).flatten() + 1
    index = torch.arange(len(ask.request.clients))
    return [part_of(ask, part) for part in torch.tensor_split(index, ends)]


def unanswered(ask: Ask, why: str) -> Answer:
    """Say why none of these clients has an answer, in the form of one."""
    request, none = ask.request, torch.zeros(0, dtype=torch.int64)
    return Answer(
        request.round_,
        request.version,
        request.first,
        none,
        none.double(),
        none,
        none,
        pieces=(torch.zeros(0, 0).double(),),
        failures=dict.fromkeys(ask.clients, printable(why)),
        rounding=None if request.uplink == FULL else none.double(),
        sizes=None if request.coding == NONE else none,
        stage=None if ask.stage is None else Stage(ask.stage.name, {}, {}),
    )


def join_answers(ask: Ask, answers: Sequence[Answer]) -> Answer:
    """Join the answers to the parts of an ask, in order; who sends other tensors has failed."""
    first, *more = [a for a in answers if len(a.clients)] or answers
    if len(answers) == 1:
        return first
    odd = [a for a in more if len(a.clients) and a.layout != first.layout]
    used = [first, *(a for a in more if len(a.clients) and a.layout == first.layout)]
    failures = {c: why for a in answers for c, why in a.failures.items()}
    for answer in odd:
        why = f"it sent {difference(answer.layout, first.layout)}"
        failures |= dict.fromkeys(answer.clients.tolist(), why)
    vectors: dict[str, Any] = {n: torch.cat([a.vectors[n] for a in used]) for n in first.vectors}
    said = {c: told for a in answers if a.stage for c, told in a.stage.data.items()}
    return replace(
        first,
        **vectors,
        first=ask.request.first,
        pieces=(torch.cat([a.numbers for a in used]),),
        failures=failures,
        refused=[refusal for a in answers for refusal in a.refused],
        notes=[*dict.fromkeys(note for a in answers for note in a.notes)][:MANY],
        metrics=join_columns([(a.metrics, len(a.clients)) for a in used]),
        stage=None if first.stage is None else replace(first.stage, data=said),
    )


def split_answer(ask: Ask, answer: Answer, asks: Sequence[Ask]) -> list[Answered]:
    """Give each of the asks that were joined the part of an answer that is its client's.

    What is in a part is checked where the answer to a single client is.

    Args:
        ask: Of all.
        answer: To it.
        asks: Of one client each.

    Raises:
        WireError: If it cannot be told which part is whose.
    """
    if len(asks) == 1:
        return [(asks[0], answer)]
    ids = answer.clients.tolist()
    named = [*ids, *answer.failures, *(r.client for r in answer.refused)]
    if len({*named}) != len(named) or not {*named} <= {*ask.clients} or ids != sorted(ids):
        raise WireError(
            f"the reply is of clients {shown(named)}, but {shown(ask.clients)} were asked, each "
            "once and in this order"
        )
    if answer.stage is None and answer.first != ask.request.first:
        raise WireError(
            f"the reply begins at place {answer.first} of the cohort, but place "
            f"{ask.request.first} was asked for"
        )
    vectors, k = answer.vectors, len(ids)
    told = {} if answer.stage is not None else vectors | answer.metrics
    if any(len(each) != k for each in told.values()):
        raise WireError(f"the reply has {[*map(len, told.values())]} values of {k} clients")
    rows, at = _rows(ask, answer), {client: i for i, client in enumerate(ids)}
    stage, notes, found = answer.stage, answer.notes, list[Answered]()
    for each in asks:
        (client,) = each.clients
        i = at.get(client, k)
        said = {} if stage is None else {c: t for c, t in stage.data.items() if c == client}
        if i == k and not said:
            why = answer.failures.get(client, "the reply of its node does not name it")
            measures = each.request.measure is not None and stage is None
            found.append((each, unanswered(each, why) if measures else NoAnswer(why)))
            continue
        here = slice(i, i + 1)  # empty in a stage that has no numbers of it
        parts: dict[str, Any] = {name: vector[here] for name, vector in vectors.items()}
        part = replace(
            answer,
            first=each.request.first,
            **parts,
            metrics={name: metric[here] for name, metric in answer.metrics.items()},
            pieces=(rows[i] if i < k else answer.numbers[:0],),
            failures={},
            refused=[],
            notes=notes,
            stage=None if stage is None else replace(stage, data=said),
        )
        notes = []
        found.append((each, part))
    return found


def _rows(ask: Ask, answer: Answer) -> list[torch.Tensor]:
    """Give the numbers of each client: a row, or where these differ in length what is its own."""
    numbers, clients = answer.numbers, answer.clients
    if not len(clients) or not len(numbers):  # in most stages nobody has any
        return [numbers[:0]] * len(clients)
    if numbers.dim() == 2 and len(numbers) == len(clients):
        return [*numbers.split(1)]
    own, kind, asked = ask.own, ask.request.uplink, ask.request.clients
    coded = kind != FULL
    if (sizes := answer.sizes) is None:
        many = uploaded_bytes(own, len(asked), kind) if coded else uploaded_numbers(own, len(asked))
        sizes = many[torch.isin(asked, clients)]
    each = sizes.tolist()
    if numbers.dim() != 1 or min(each) < 0 or sum(each) != len(numbers):
        raise WireError(f"{tuple(numbers.shape)} numbers came, but {sum(each)} are wanted")
    return [*numbers.split(each)]
