"""Join requests to several clients into one message, and split their reply.

Clients of one node need not be consecutive in the cohort. Those of one chunk are trained as one
batch, as ``engine=vectorized`` trains the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedraclora.errors import WireError
from fedraclora.protocol.quantized import FULL
from fedraclora.protocol.rank_budgets import uploaded_numbers
from fedraclora.tree import Layout, difference, join_columns
from fedraclora.wire.answers import (
    Answer,
    NoAnswer,
    NumericAnswer,
    StageAnswer,
    SummedAnswer,
    TrainedAnswer,
    TrainingAnswer,
    failed_answer,
)
from fedraclora.wire.changes import uploaded_bytes
from fedraclora.wire.exchange import Ask, sent_tensors
from fedraclora.wire.fields import MANY, printable, shown

Answered = tuple[Ask, Answer | NoAnswer]


def join_asks(asks: Sequence[Ask]) -> Ask:
    """Join requests that differ only in their clients, in order."""
    first, *more = asks
    if not more:
        return first
    order = torch.cat([ask.request.order for ask in asks])
    clients = torch.cat([ask.request.clients for ask in asks])
    said = {c: told for ask in asks if ask.stage for c, told in ask.stage.data.items()}
    stage = None if first.stage is None else replace(first.stage, data=said)
    return replace(_asking(first, clients, order), stage=stage)


def part_of(ask: Ask, index: torch.Tensor) -> Ask:
    """Select some clients of a request, int64 places, with only their tensors."""
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
    """Split a request into chunks of ``size`` clients of the round."""
    ends = torch.nonzero((ask.request.order // size).diff()).flatten() + 1
    index = torch.arange(len(ask.request.clients))
    return [part_of(ask, part) for part in torch.tensor_split(index, ends)]


def unanswered(ask: Ask, why: str) -> Answer:
    """Build a reply that records why all of these clients have none."""
    return failed_answer(ask, dict.fromkeys(ask.clients, printable(why)))


def join_answers(ask: Ask, answers: Sequence[Answer]) -> Answer:
    """Join the replies to parts of a request, in order; clients with other tensors have failed."""
    first, *more = [a for a in answers if len(a.clients)] or answers
    if len(answers) == 1:
        return first
    odd = [a for a in more if len(a.clients) and _layout(a) != _layout(first)]
    used = [first, *(a for a in more if len(a.clients) and _layout(a) == _layout(first))]
    failures = {c: why for a in answers for c, why in a.failures.items()}
    for answer in odd:
        why = f"it sent {difference(_layout(answer), _layout(first))}"
        failures |= dict.fromkeys(answer.clients.tolist(), why)
    joined: dict[str, Any] = {n: torch.cat([a.vectors[n] for a in used]) for n in first.vectors}
    joined["failures"] = failures
    joined["notes"] = [*dict.fromkeys(note for a in answers for note in a.notes)][:MANY]
    if isinstance(first, StageAnswer):
        return _stages_joined(first, [a for a in answers if isinstance(a, StageAnswer)], joined)
    worked = [a for a in used if isinstance(a, NumericAnswer)]
    joined |= {"first": ask.request.first, "pieces": (torch.cat([a.numbers for a in worked]),)}
    trained = [a for a in worked if isinstance(a, TrainingAnswer)]
    if trained:
        joined["metrics"] = join_columns([(a.metrics, len(a.clients)) for a in trained])
    if isinstance(first, SummedAnswer):
        joined["refused"] = [r for a in answers if isinstance(a, SummedAnswer) for r in a.refused]
    return replace(first, **joined)


def _layout(answer: Answer) -> Layout:
    return answer.layout if isinstance(answer, NumericAnswer) else Layout(())


def _stages_joined(
    first: StageAnswer, answers: Sequence[StageAnswer], joined: dict[str, Any]
) -> StageAnswer:
    said = {c: told for a in answers for c, told in a.stage.data.items()}
    words = [a.words for a in answers if a.words is not None and len(a.clients)]
    return replace(
        first,
        **joined,
        stage=replace(first.stage, data=said),
        words=torch.cat(words) if words else first.words,
    )


def split_answer(ask: Ask, answer: Answer, asks: Sequence[Ask]) -> list[Answered]:
    """Split a reply into one for each of the joined requests.

    The caller checks the content of each part, as it does for a reply of a single client.

    Args:
        ask: The joined request.
        answer: Its reply.
        asks: The requests to one client each.

    Raises:
        WireError: If a part cannot be assigned to a client.
    """
    if len(asks) == 1:
        return [(asks[0], answer)]
    ids = answer.clients.tolist()
    named = [*ids, *answer.failures]
    named += [r.client for r in answer.refused] if isinstance(answer, SummedAnswer) else []
    if len({*named}) != len(named) or not {*named} <= {*ask.clients} or ids != sorted(ids):
        raise WireError(
            f"the reply is from clients {shown(named)}, expected {shown(ask.clients)}, each "
            "once and in this order"
        )
    rows, at = _parts(ask, answer), {client: i for i, client in enumerate(ids)}
    notes, found = answer.notes, list[Answered]()
    for each in asks:
        (client,) = each.clients
        i = at.get(client)
        said = answer.stage.data.keys() & {client} if isinstance(answer, StageAnswer) else ()
        if i is None and not said:
            why = answer.failures.get(client, "the reply of its node does not name it")
            measures = each.request.measure is not None and each.stage is None
            found.append((each, unanswered(each, why) if measures else NoAnswer(why)))
            continue
        kept = torch.arange(len(ids)) == (len(ids) if i is None else i)
        part = replace(answer.select(kept), failures={}, notes=notes)
        if isinstance(part, StageAnswer):
            data = {c: told for c, told in part.stage.data.items() if c == client}
            words = None if part.words is None else part.words[kept] if len(ids) else part.words
            part = replace(part, stage=replace(part.stage, data=data), words=words)
        elif isinstance(part, NumericAnswer) and i is not None:
            part = replace(part, first=each.request.first, pieces=(rows[i],))
        if isinstance(part, SummedAnswer):
            part = replace(part, refused=[])
        notes = []
        found.append((each, part))
    return found


def _parts(ask: Ask, answer: Answer) -> list[torch.Tensor]:
    """Return the numbers of each client; none for a stage, whose words stay together."""
    k = len(answer.clients)
    if isinstance(answer, StageAnswer):
        if answer.words is not None and k and len(answer.words) != k:
            raise WireError(f"the reply has {len(answer.words)} masked vectors of {k} clients")
        return []
    if not isinstance(answer, NumericAnswer):
        raise WireError("the reply has no numbers")
    if answer.first != ask.request.first:
        raise WireError(
            f"the reply begins at place {answer.first} of the round's clients, expected place "
            f"{ask.request.first}"
        )
    metrics = answer.metrics if isinstance(answer, TrainingAnswer) else {}
    told = [*answer.vectors.values(), *metrics.values()]
    if any(len(each) != k for each in told):
        raise WireError(f"the reply has {[*map(len, told)]} values of {k} clients")
    return _rows(ask, answer)


def _rows(ask: Ask, answer: NumericAnswer) -> list[torch.Tensor]:
    """Return the numbers of each client: a row, or its own part if the lengths differ."""
    numbers, clients = answer.numbers, answer.clients
    if not len(clients) or not len(numbers):
        return [numbers[:0]] * len(clients)
    if numbers.dim() == 2 and len(numbers) == len(clients):
        return [*numbers.split(1)]
    own, kind, asked = ask.own, ask.request.uplink, ask.request.clients
    coded = kind != FULL
    sizes = answer.sizes if isinstance(answer, TrainedAnswer) else None
    if sizes is None:
        many = uploaded_bytes(own, len(asked), kind) if coded else uploaded_numbers(own, len(asked))
        sizes = many[torch.isin(asked, clients)]
    each = sizes.tolist()
    if numbers.dim() != 1 or min(each) < 0 or sum(each) != len(numbers):
        raise WireError(f"{tuple(numbers.shape)} numbers came, but {sum(each)} are wanted")
    return [*numbers.split(each)]
