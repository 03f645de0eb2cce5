"""What comes back from a chunk of clients: their rows, or float64 sums of blocks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import RecordDict

from fedraclora.errors import WireError
from fedraclora.protocol.cohorts import client_weights
from fedraclora.protocol.uplinks import SUM_BLOCK, Refusal, block_sums, check_rows
from fedraclora.training.extra import LocalResult
from fedraclora.tree import Layout, difference
from fedraclora.wire.changes import Coded
from fedraclora.wire.downlink import TrainRequest
from fedraclora.wire.fields import (
    MANY,
    client_id,
    exactly,
    flag,
    listed,
    mapping,
    printable,
    reading,
    shown,
    whole,
    worded,
)
from fedraclora.wire.records import (
    array_record,
    header_record,
    read_array,
    read_first,
    read_header,
    read_layout,
    read_vectors,
    vector_record,
)
from fedraclora.wire.unwritten import Records, held_by, unwritten

WANTED = {"clients", "losses", "samples", "steps"}
HEADER = frozenset({"round", "version", "failures", "refused", "reduced", "notes", "layout"})


@dataclass(frozen=True)
class Reply:
    """What a chunk sent back: what its clients trained, and who failed.

    Attributes:
        round_, version: Of the message that is answered.
        first: Place of the chunk's first client in the cohort.
        clients: Ids of the clients whose work is here, int64 [k].
        losses, samples, steps: One value per client [k].
        pieces: The columns of `numbers`, side by side: in this process large tensors stay where
            they were trained.
        reduced: Whether they are sums.
        failures: Why a client trained nothing, by id.
        refused: Clients that a sum leaves out, because their numbers cannot be used.
        notes: Sentences for the ledger.
        rounding: What rounding added to the change of each client, relative to it [k]; None where
            numbers are sent as they are.
    """

    round_: int
    version: int
    first: int
    clients: torch.Tensor
    losses: torch.Tensor
    samples: torch.Tensor
    steps: torch.Tensor
    pieces: tuple[torch.Tensor, ...]
    reduced: bool
    failures: dict[int, str]
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rounding: torch.Tensor | None = None

    @cached_property
    def numbers(self) -> torch.Tensor:
        """Their rows [k, P]; under rank budgets what is left of the rows, one after another.

        Or float64 sums of the chunk's blocks [blocks, P].
        """
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces, dim=-1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `numbers`, which are not joined for it."""
        *lead, last = (piece.shape for piece in self.pieces)
        return (*last[:-1], sum(piece[-1] for piece in (*lead, last))) if last else ()

    @property
    def vectors(self) -> dict[str, torch.Tensor]:
        """What has one value per client."""
        found = {name: getattr(self, name) for name in sorted(WANTED)}
        return found if self.rounding is None else found | {"rounding": self.rounding}

    def select(self, kept: torch.Tensor) -> Reply:
        """Keep some of the clients, bool [k], in everything but their numbers."""
        vectors: dict[str, Any] = {name: each[kept] for name, each in self.vectors.items()}
        return replace(self, **vectors)


@dataclass(frozen=True)
class Answered:
    """What a reply says, before it is written.

    Attributes:
        reply: Its fields.
        layout: What each client sends.
    """

    reply: Reply
    layout: Layout


def pack_result(
    result: LocalResult | None,
    request: TrainRequest,
    clients: torch.Tensor,
    layout: Layout,
    failures: Mapping[int, str],
    notes: list[str],
    mask: torch.Tensor | None = None,
    coded: Coded | None = None,
) -> RecordDict:
    """Answer with what a chunk brought back.

    Args:
        result: Of the clients that trained, or None if none did.
        request: What was asked. With ``reduce``, rows are checked and summed here, so that what
            goes back does not grow with the chunk.
        clients: Who trained, int64 [k], a part of ``request.clients``.
        layout: What each client sends.
        failures: Why a client trained nothing, by id.
        notes: Sentences for the ledger.
        mask: Which numbers of its row each client sends, bool [k, P]; None: all.
        coded: The rows in fewer bits, where ``result`` has them as they will be read; None: they
            are sent as they are.
    """
    if result is None:  # every client of the chunk failed
        none = torch.zeros(0, dtype=torch.int64)
        result = LocalResult(
            {n: torch.empty(0, *s) for n, s in layout.shapes}, none.double(), none, none
        )
    trained = {n: result.trained[n] for n, _ in layout.shapes}
    refused: list[Refusal] = []
    vectors = {"clients": clients, "losses": result.losses}
    vectors |= {"samples": result.samples, "steps": result.steps}
    if coded is not None:
        vectors["rounding"] = torch.tensor(coded.errors, dtype=torch.float64)
    pieces: tuple[torch.Tensor, ...]
    if request.reduce is not None:
        numbers = layout.pack(trained, lead=1)
        weights = client_weights(request.reduce, result.samples)
        refused = check_rows(clients, weights, result.losses, [numbers])
        if refused:
            kept = ~torch.isin(clients, torch.tensor([r.client for r in refused]))
            numbers, weights = numbers[kept.to(numbers.device)], weights[kept]
            vectors = {name: vector[kept] for name, vector in vectors.items()}
        whole = len(numbers) == len(request.clients)
        places = None if whole else torch.searchsorted(request.clients, vectors["clients"])
        sums = block_sums(numbers, weights, places)
        missing = -(-len(request.clients) // SUM_BLOCK) - len(sums)
        pieces = (F.pad(sums, (0, 0, 0, missing)) if missing else sums,)
    elif coded is not None:
        pieces = (torch.cat([torch.zeros(0, dtype=torch.uint8), *coded.codes]),)
    elif mask is not None:
        numbers = layout.pack(trained, lead=1)
        pieces = (numbers[mask.to(numbers.device)],)
    else:
        pieces = layout.pieces(trained)
    reply = Reply(
        request.round_,
        request.version,
        request.first,
        **vectors,
        pieces=tuple(piece.detach().cpu() for piece in pieces),
        reduced=request.reduce is not None,
        failures={client: printable(reason) for client, reason in failures.items()},
        refused=refused,
        notes=[printable(note) for note in notes],
    )
    return unwritten(Answered(reply, layout), partial(_records, reply, layout))


def _records(reply: Reply, layout: Layout) -> Records:
    """Write a reply."""
    header = {
        "round": reply.round_,
        "version": reply.version,
        "failures": {str(c): r for c, r in reply.failures.items()},
        "refused": [[r.client, r.reason] for r in reply.refused],
        "reduced": reply.reduced,
        "notes": reply.notes,
        "layout": layout.shapes,
    }
    chunk = vector_record(reply.vectors)
    chunk["first"] = reply.first
    return {"config": header_record(header), "arrays": array_record(reply.numbers), "chunk": chunk}


def unpack_result(
    content: RecordDict,
    layout: Layout,
    ranks: torch.Tensor | None = None,
    read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Reply:
    """Read a reply back: the one place where what another machine sent is looked at unchecked.

    Every field has the type, the range and the length that it should have, or the reply is
    refused. Whether it is the answer to the message is for the server to say.

    Args:
        content: The reply.
        layout: What a client sends, budgets aside.
        ranks: The cohort's rank budgets, if it has any: then rows are cut, and their sizes are
            left to `fedraclora.protocol.rank_budgets.widen`.
        read: Gives the numbers of some clients from their bytes and their ids; None: the numbers
            came as they are.

    Raises:
        WireError: Saying what came and what was wanted.
    """
    if isinstance(answered := held_by(content), Answered):
        reply, sent = answered.reply, answered.layout
    else:
        with reading("a reply"):
            reply, sent = _read(content, coded=read is not None)
    if read is not None and not reply.reduced:
        with reading("a reply"):
            try:
                reply = replace(reply, pieces=(read(reply.numbers, reply.clients),))
            except WireError as error:
                raise WireError(f"{_who(reply)} sent what cannot be read: {error}") from error
    if sent != layout:
        raise WireError(
            f"{_who(reply)} sent other tensors than was asked: {difference(sent, layout)}"
        )
    with reading("a reply"):
        _check_sizes(reply, layout, cut=ranks is not None and not reply.reduced)
    return reply


def _who(reply: Reply) -> str:
    """Name the clients of a reply, to begin the sentence of an error."""
    return f"round {reply.round_}: clients {reply.clients.tolist()}"


def _read(content: RecordDict, *, coded: bool) -> tuple[Reply, Layout]:
    """Read the fields of a reply, and the layout of its rows."""
    header = read_header(content)
    exactly(header, HEADER, "the header of a reply")
    round_ = whole(header["round"], "its round")
    reply = Reply(
        round_,
        whole(header["version"], "its version"),
        read_first(content),
        **_vectors(content, round_, WANTED | {"rounding"} if coded else WANTED),
        pieces=(read_array(content, "arrays"),),
        reduced=flag(header["reduced"], "reduced"),
        failures=_failures(header["failures"]),
        refused=_refused(header["refused"]),
        notes=[worded(note, "a note") for note in listed(header["notes"], "notes", MANY)],
    )
    return reply, read_layout(header["layout"], f"round {round_}: the layout")


def _vectors(content: RecordDict, round_: int, wanted: set[str]) -> dict[str, torch.Tensor]:
    """Read the vectors of a reply, all of them."""
    vectors = read_vectors(content)
    if vectors.keys() != wanted:
        raise WireError(
            f"round {round_}: a reply has the vectors {[*vectors]}; {sorted(wanted)} are wanted"
        )
    return vectors


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


def _check_sizes(reply: Reply, layout: Layout, *, cut: bool) -> None:
    """Reject a number of rows, losses or sizes that is not the number of clients."""
    shape, count = reply.shape, len(reply.clients)
    rows = shape[0] if reply.reduced and shape else count
    fits = len(shape) == 1 if cut else shape == (rows, layout.size)
    lengths = [len(vector) for vector in reply.vectors.values()]
    if not fits or set(lengths) != {count}:
        raise WireError(
            f"round {reply.round_}: a reply has rows of shape {shape} and {lengths} "
            f"ids, losses and sizes; {(rows, layout.size)} and {count} of each are wanted"
        )
