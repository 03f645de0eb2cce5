"""Check a client's reply, by its kind.

`received` validates the fields of a reply from another machine. `checked` compares a reply with its
request and decodes its numbers. The other checks of an update are `check_reply`
(`fedraclora.strategies.server.guard`), ``Exchange._check_ids``
(`fedraclora.strategies.server.exchange`) and `check_rows` (`fedraclora.protocol.uplinks`);
CONTRIBUTING.md lists all of them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch

from fedraclora.errors import WireError
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.quantized import FULL
from fedraclora.protocol.uplinks import Refusal
from fedraclora.tree import Layout, difference
from fedraclora.wire.answers import (
    VECTORS,
    Answer,
    NumericAnswer,
    StageAnswer,
    SummedAnswer,
    TrainedAnswer,
    TrainingAnswer,
    answer_kind,
)
from fedraclora.wire.exchange import Ask
from fedraclora.wire.fields import (
    MANY,
    checked_name,
    layout_of,
    printable,
    reading,
    shown,
    whole_number,
)
from fedraclora.wire.secagg import check_stage, check_words

A = TypeVar("A", bound=Answer)
Decode = Callable[..., torch.Tensor]


def received(answer: Answer, ask: Ask) -> Answer:
    """Validate the fields of a reply from another machine; escape unprintable text in it.

    Raises:
        WireError: If a field is invalid; it names the field, its value and the expected one.
    """
    if type(answer) is not (kind := answer_kind(ask)):
        raise WireError(f"the reply is {answer.name!r}, expected one that is {kind.name!r}")
    whole_number(answer.round_, "its round")
    whole_number(answer.version, "its version")
    for name, vector in answer.vectors.items():
        _check_vector(name, vector)
    if len(answer.notes) > MANY:
        raise WireError(f"notes has {len(answer.notes)} elements, expected at most {MANY}")
    changes: dict[str, Any] = {
        "failures": {c: printable(why) for c, why in answer.failures.items()},
        "notes": [printable(note) for note in answer.notes],
    }
    match answer:
        case StageAnswer():
            check_stage(answer.stage)
            if answer.words is not None:
                check_words(answer.words)
            return replace(answer, **changes)
        case NumericAnswer():
            whole_number(answer.first, "the place of its first client")
            layout_of(answer.layout.shapes, "the layout")
            if len(answer.pieces) != 1:
                raise WireError(f"the reply has {len(answer.pieces)} arrays, expected one")
    if isinstance(answer, TrainingAnswer):
        _check_training(answer, ask)
        changes["metrics"] = {printable(n): values for n, values in answer.metrics.items()}
    if isinstance(answer, SummedAnswer):
        changes["refused"] = [
            Refusal(whole_number(r.client, "a client that is refused"), printable(r.reason))
            for r in answer.refused
        ]
    return replace(answer, **changes)


def _check_vector(name: str, vector: torch.Tensor) -> None:
    if vector.dtype != VECTORS[name] or vector.dim() != 1:
        raise WireError(
            f"{name} has the shape {tuple(vector.shape)} and the type {vector.dtype}, "
            "expected a row of "
            f"{VECTORS[name]}"
        )


def _check_training(answer: TrainingAnswer, ask: Ask) -> None:
    """Check the fields of a training reply."""
    wanted = {"rounding": ask.request.uplink != FULL}
    if isinstance(answer, TrainedAnswer):
        wanted["sizes"] = ask.request.coding != NONE
    for name, is_wanted in wanted.items():
        if (getattr(answer, name) is not None) != is_wanted:
            raise WireError(f"the reply has {'no' if is_wanted else 'the'} vector {name}")
    for name, values in answer.metrics.items():
        checked_name(name, "a metric")
        _check_vector("metrics", values)
        if values.isinf().any():
            raise WireError(f"the metric {shown(name)} is {shown(values.tolist())}; it is infinite")


@dataclass(frozen=True)
class ExpectedReply:
    """The reply that an exchange expects.

    Attributes:
        round_: The current round.
        version: The version of the weights that the request was sent with.
        layout: The tensors that each client sends, without rank budgets; None accepts the layout
            of the reply.
        ranks: Rank budgets of the round's clients, or None. With budgets, a client's row is as long
            as its budget says, which `fedraclora.protocol.rank_budgets.widen` checks.
        decode: Decodes clients' numbers from their bytes, their ids and ``lengths`` (bytes of each
            client, if entropy coded); None if numbers are not encoded.
    """

    round_: int
    version: int
    layout: Layout | None = None
    ranks: torch.Tensor | None = None
    decode: Decode | None = None


def checked(answer: Answer, ask: Ask, kind: type[A], wanted: ExpectedReply) -> A:
    """Check a reply against its request, and decode quantized numbers.

    Args:
        answer: The reply.
        ask: The request.
        kind: The class of replies that the caller can use.
        wanted: Round, version, layout and ranks that the reply must match.

    Raises:
        WireError: If they do not match; it names the field, its value and the expected one.
    """
    sender, expected = _who(answer), answer_kind(ask)
    if type(answer) is not expected or not isinstance(answer, kind):
        raise WireError(f"{sender} sent what is {answer.name!r}, expected {expected.name!r}")
    if (answer.round_, answer.version) != (wanted.round_, wanted.version):
        raise WireError(
            f"clients {answer.clients.tolist()} answered for round {answer.round_} from version "
            f"{answer.version}, but were asked for round {wanted.round_} from version "
            f"{wanted.version}"
        )
    found = answer
    if isinstance(answer, NumericAnswer):
        found = cast(A, _numbers_checked(answer, wanted))
    elif isinstance(answer, StageAnswer) and answer.stage.name != getattr(ask.stage, "name", None):
        raise WireError("the reply is not one of this stage of secure aggregation")
    return found


def _numbers_checked(answer: NumericAnswer, wanted: ExpectedReply) -> NumericAnswer:
    if isinstance(answer, TrainedAnswer) and wanted.decode is not None:
        answer = _decoded(answer, wanted.decode)
    layout = answer.layout if wanted.layout is None else wanted.layout
    if answer.layout != layout:
        raise WireError(
            f"{_who(answer)} sent other tensors than was asked: {difference(answer.layout, layout)}"
        )
    with reading("a reply"):
        cut = wanted.ranks is not None and isinstance(answer, TrainedAnswer)
        _check_sizes(answer, layout, cut=cut)
    return answer


def _decoded(answer: TrainedAnswer, decode: Decode) -> TrainedAnswer:
    with reading("a reply"):
        try:
            numbers = decode(answer.numbers, answer.clients, lengths=answer.sizes)
        except WireError as error:
            raise WireError(f"{_who(answer)} sent what cannot be read: {error}") from error
    return replace(answer, pieces=(numbers,))


def _who(answer: Answer) -> str:
    """Name the round and the clients of a reply, for error messages."""
    return f"round {answer.round_}: clients {answer.clients.tolist()}"


def _check_sizes(answer: NumericAnswer, layout: Layout, *, cut: bool) -> None:
    """Check that a reply has one row, one loss and one size for each of its clients."""
    shape, count = answer.shape, len(answer.clients)
    rows = shape[0] if isinstance(answer, SummedAnswer) and shape else count
    fits = len(shape) == 1 if cut else shape == (rows, layout.size)
    metrics: Mapping[str, torch.Tensor] = getattr(answer, "metrics", {})
    lengths = [len(each) for each in (*answer.vectors.values(), *metrics.values())]
    if not fits or set(lengths) != {count}:
        raise WireError(
            f"round {answer.round_}: a reply has rows of shape {shape} and {lengths} "
            f"ids, losses and sizes, expected {(rows, layout.size)} and {count} of each"
        )
