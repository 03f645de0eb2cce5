"""What comes back as a message, and the checks of an answer, wherever it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fedraclora.errors import WireError
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.quantised import FULL
from fedraclora.protocol.uplinks import Refusal
from fedraclora.tree import Layout, difference
from fedraclora.wire.exchange import Answer, Ask
from fedraclora.wire.fields import (
    MANY,
    client_id,
    exactly,
    flag,
    listed,
    mapping,
    reading,
    shown,
    whole,
    worded,
)
from fedraclora.wire.records import (
    Content,
    Fields,
    array_record,
    header_record,
    message_header,
    read_array,
    read_first,
    read_layout,
    read_vectors,
    round_of,
    vector_record,
)
from fedraclora.wire.secagg import read_stage, read_words

WANTED = {"clients", "losses", "samples", "steps"}
HEADER = frozenset({"round", "version", "failures", "refused", "reduced", "notes", "layout"})


def write_answer(answer: Answer) -> Content:
    """Write an answer as a message."""
    header: dict[str, object] = {
        "round": answer.round_,
        "version": answer.version,
        "failures": {str(c): r for c, r in answer.failures.items()},
        "refused": [[r.client, r.reason] for r in answer.refused],
        "reduced": answer.reduced,
        "notes": answer.notes,
        "layout": answer.layout.shapes,
    }
    if answer.metrics:
        header["metrics"] = {
            n: [None if math.isnan(v) else v for v in told.tolist()]
            for n, told in answer.metrics.items()
        }
    found: Content = {"arrays": array_record(answer.numbers)}
    if answer.stage is None:
        chunk = vector_record(answer.vectors)
        chunk["first"] = answer.first
        return {"config": header_record(header), **found, "chunk": chunk}
    told = ("round", "failures", *(("version", "notes") if answer.stage.name == "masked" else ()))
    return {
        "config": header_record({name: header[name] for name in told}),
        **found,
        "chunk": vector_record({"clients": answer.clients}),
        "secure": Fields(answer.stage.texts),
    }


def read_answer(content: Content, ask: Ask) -> Answer:
    """Read an answer back: the one place where what another machine sent is looked at unchecked.

    Every field has the type and the range that it should have, or the answer is refused. Whether
    it is the answer to the ask is for the server to say.

    Args:
        content: The message.
        ask: What it answers.

    Raises:
        WireError: Saying what came and what was wanted.
    """
    with reading("a reply"):
        return _read(content, ask) if ask.stage is None else _read_stage(content, ask.stage.name)


def checked(
    answer: Answer,
    layout: Layout,
    ranks: torch.Tensor | None = None,
    read: Callable[..., torch.Tensor] | None = None,
) -> Answer:
    """Check the numbers of an answer, and read them where they came in fewer bits.

    Args:
        answer: What came.
        layout: What a client sends, budgets aside.
        ranks: The cohort's rank budgets, if it has any: then rows are cut, and their sizes are
            left to `fedraclora.protocol.rank_budgets.widen`.
        read: Gives the numbers of some clients from their bytes and their ids, and from `lengths`,
            the bytes of each, where these are coded; None: the numbers came as they are.

    Raises:
        WireError: Saying what came and what was wanted.
    """
    if read is not None and not answer.reduced:
        with reading("a reply"):
            try:
                numbers = read(answer.numbers, answer.clients, lengths=answer.sizes)
                answer = replace(answer, pieces=(numbers,))
            except WireError as error:
                raise WireError(f"{_who(answer)} sent what cannot be read: {error}") from error
    if answer.layout != layout:
        raise WireError(
            f"{_who(answer)} sent other tensors than was asked: {difference(answer.layout, layout)}"
        )
    with reading("a reply"):
        _check_sizes(answer, layout, cut=ranks is not None and not answer.reduced)
    return answer


def _who(answer: Answer) -> str:
    """Name the clients of an answer, to begin the sentence of an error."""
    return f"round {answer.round_}: clients {answer.clients.tolist()}"


def _read(content: Content, ask: Ask) -> Answer:
    """Read the fields of an answer."""
    header = message_header(content)
    told = mapping(header.pop("metrics", {}), "metrics")
    exactly(header, HEADER, "the header of a reply")
    round_ = whole(header["round"], "its round")
    wanted = WANTED if ask.request.uplink == FULL else WANTED | {"rounding"}
    wanted = wanted if ask.request.coding == NONE else wanted | {"sizes"}
    vectors: dict[str, Any] = read_vectors(content)
    if vectors.keys() != wanted:
        raise WireError(
            f"round {round_}: a reply has the vectors {[*vectors]}; {sorted(wanted)} are wanted"
        )
    return Answer(
        round_,
        whole(header["version"], "its version"),
        read_first(content),
        **vectors,
        pieces=(read_array(content, "arrays"),),
        reduced=flag(header["reduced"], "reduced"),
        failures=_failures(header["failures"]),
        refused=_refused(header["refused"]),
        notes=[worded(note, "a note") for note in listed(header["notes"], "notes", MANY)],
        layout=read_layout(header["layout"], f"round {round_}: the layout"),
        metrics={worded(n, "a metric"): _told(n, v, len(ask.clients)) for n, v in told.items()},
    )


def _told(name: str, values: object, most: int) -> torch.Tensor:
    """Read what clients say by one name: finite numbers, or null of one that does not say it."""
    each = [math.nan if v is None else v for v in listed(values, f"the metric {shown(name)}", most)]
    if not all(type(v) is float and not math.isinf(v) for v in each):
        raise WireError(f"the metric {shown(name)} has {shown(values)}; finite numbers are wanted")
    return torch.tensor(each, dtype=torch.float64)


def _read_stage(content: Content, name: str) -> Answer:
    """Read an answer of secure aggregation."""
    stage, vectors = read_stage(content), read_vectors(content)
    if stage is None or stage.name != name:
        raise WireError(f"the reply is not an answer to the stage {name} of secure aggregation")
    header, empty = message_header(content), torch.empty(0)
    return Answer(
        round_of(content),
        whole(header.get("version", 0), "its version"),
        0,
        vectors["clients"],
        empty,
        empty,
        empty,
        pieces=(read_words(content) if name == "masked" else empty,),
        failures=_failures(header["failures"]),
        notes=[worded(note, "a note") for note in listed(header.get("notes", []), "notes", MANY)],
        stage=stage,
    )


def _failures(value: object) -> dict[int, str]:
    """Read why clients trained nothing, by id."""
    return {
        client_id(client, "failures"): worded(why, "the reason of a failure")
        for client, why in mapping(value, "failures").items()
    }


def _refused(value: object) -> list[Refusal]:
    """Read which clients a sum leaves out, and why."""
    found = []
    for pair in listed(value, "refused"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise WireError(
                f"an entry of refused is {shown(pair)}; the id of a client and a reason are wanted"
            )
        client = whole(pair[0], "a client that is refused")
        found.append(Refusal(client, worded(pair[1], "the reason of a refusal")))
    return found


def _check_sizes(reply: Answer, layout: Layout, *, cut: bool) -> None:
    """Reject a number of rows, losses or sizes that is not the number of clients."""
    shape, count = reply.shape, len(reply.clients)
    rows = shape[0] if reply.reduced and shape else count
    fits = len(shape) == 1 if cut else shape == (rows, layout.size)
    lengths = [len(each) for each in (*reply.vectors.values(), *reply.metrics.values())]
    if not fits or set(lengths) != {count}:
        raise WireError(
            f"round {reply.round_}: a reply has rows of shape {shape} and {lengths} "
            f"ids, losses and sizes; {(rows, layout.size)} and {count} of each are wanted"
        )
