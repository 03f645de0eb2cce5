"""What goes to clients: a downlink, packed once for the whole cohort, and who is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from flwr.app import RecordDict

from fedraclora.errors import WireError
from fedraclora.protocol.derived import Derived
from fedraclora.protocol.downlink import differs
from fedraclora.protocol.method import Downlink
from fedraclora.protocol.quantised import FULL, ROUNDED, packed_bytes
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Layout, Tree
from fedraclora.weights.chain import SEED_BYTES
from fedraclora.wire.described import ASKED, describe, described_downlink
from fedraclora.wire.fields import exactly, flag, reading, real, shown, whole
from fedraclora.wire.records import (
    DTYPES,
    array_record,
    header_record,
    packed_numbers,
    read_array,
    read_first,
    read_header,
    read_layout,
    read_numbers,
    read_vectors,
    tree_record,
    vector_record,
)
from fedraclora.wire.unwritten import Records, held_by, unwritten, written

WEIGHTS = (None, "examples", "uniform")
COEFFICIENTS = "coefficients"  # of factors that are computed from the last link, in float64
HEADER = ASKED | {"round", "version", "rate_scale", "reduce", "clip", "layout", "own"}
HEADER |= {"uplink", "kind", "feedback", COEFFICIENTS}


def uplink_layout(downlink: Downlink) -> Layout:
    """Names and shapes of what each client sends back."""
    return downlink.layout


@dataclass(frozen=True)
class TrainRequest:
    """What a train message says beside the downlink.

    Attributes:
        round_: From 1.
        version: Version of the base weights that the clients must hold.
        rate_scale: Of the step sizes in this round.
        clients: Ids, int64 [k].
        first: Place of the first of them in the cohort.
        reduce: None for one row per client; ``examples`` or ``uniform`` for weighted sums of
            blocks of clients (`fedraclora.protocol.uplinks`), where ``first`` opens a block.
        clip: The greatest norm of the update that a client may send; None: any.
        uplink: How the clients' numbers travel (`fedraclora.protocol.quantised`).
        feedback: Whether clients keep what rounding left (`fedraclora.wire.feedback`).
    """

    round_: int
    version: int
    rate_scale: float
    clients: torch.Tensor
    first: int = 0
    reduce: str | None = None
    clip: float | None = None
    uplink: str = FULL
    feedback: bool = False


def payload_bytes(downlink: Downlink, cohort: int, kind: str) -> int:
    """Count the payload of a downlink to one client of a cohort.

    Args:
        downlink: What is sent.
        cohort: To how many.
        kind: Of its numbers: a key of `WIDTHS`, or one of `ROUNDED`.

    Returns:
        The bytes of its numbers, and 8 per seed; of what is computed from the last link those of
        the coefficients and of a seed.
    """
    sent = _sent(downlink).values()
    shared = [t.numel() for t, own in sent if not own]
    own = [t.numel() // cohort for t, own in sent if own]
    starts = [slot.start for slot in downlink.trained().values()]
    seeds = [isinstance(f, SketchSpec | Derived) for f in [*downlink.factors().values(), *starts]]
    coefficients = sum(t.nbytes for t in _coefficients(downlink).values())
    return int(packed_bytes(shared + own, kind)) + SEED_BYTES * sum(seeds) + coefficients


@dataclass(frozen=True)
class Asked:
    """What a train message says before it is written; ``apart``: not the same to all clients."""

    downlink: Downlink
    request: TrainRequest
    apart: bool

    def read(self) -> tuple[Downlink, TrainRequest]:
        """Return what a client reads."""
        if not self.apart:
            return self.downlink, self.request
        first = self.request.first
        places = torch.arange(first, first + len(self.request.clients))
        return self.downlink.select(places), self.request


class Packed:
    """A downlink for messages; what the cohort shares is written once, where one is written.

    Args:
        downlink: What to train.
        request: Round, version and step sizes.
        dtype: Of the numbers: float32 or float64; coefficients are float64.
        kind: How they travel; they have been rounded to it.
    """

    def __init__(
        self, downlink: Downlink, request: TrainRequest, dtype: str, kind: str = FULL
    ) -> None:
        self.downlink, self.request = downlink.to(DTYPES[dtype]), request
        self.sent, self.kind = _sent(self.downlink), kind
        self.own = {n: t for n, (t, own) in self.sent.items() if own}
        self.own_layout = Layout.of(self.own, skip=1)

    @cached_property
    def shared(self) -> Records:
        """The records of what the cohort shares."""
        downlink, request = self.downlink, self.request
        shared = {n: t for n, (t, own) in self.sent.items() if not own}
        layout = Layout.of(shared)
        coefficients = _coefficients(downlink)
        beside = Layout.of(coefficients)
        header = {
            "round": request.round_,
            "version": request.version,
            "rate_scale": request.rate_scale,
            "reduce": request.reduce,
            "clip": request.clip,
            "uplink": request.uplink,
            "feedback": request.feedback,
            "kind": self.kind,
            **describe(downlink),
            "layout": layout.shapes,
            "own": self.own_layout.shapes,
            COEFFICIENTS: beside.shapes,
        }
        numbers = packed_numbers(layout.pack(shared), layout, self.kind)
        arrays = {"flat": numbers} | (
            {COEFFICIENTS: beside.pack(coefficients)} if beside.size else {}
        )
        return {"config": header_record(header), "arrays": tree_record(arrays)}

    def message(self, clients: torch.Tensor, first: int) -> RecordDict:
        """Make the content of a message to clients at the places ``first, first + 1, ...``."""
        request = replace(self.request, clients=clients, first=first)
        apart = bool(self.own) or self.downlink.ranks is not None
        asked = Asked(self.downlink, request, apart)
        return unwritten(asked, partial(self._records, clients, first))

    def _records(self, clients: torch.Tensor, first: int) -> Records:
        """Write such a message."""
        places = slice(first, first + len(clients))
        vectors = {"clients": clients}
        if self.downlink.ranks is not None:
            vectors["ranks"] = self.downlink.ranks[places]
        chunk = vector_record(vectors)
        chunk["first"] = first
        records = {**self.shared, "chunk": chunk}
        if self.own:
            rows = self.own_layout.pack({n: t[places] for n, t in self.own.items()}, lead=1)
            records["own"] = array_record(packed_numbers(rows, self.own_layout, self.kind))
        return records


def pack_downlink(downlink: Downlink, request: TrainRequest, dtype: str) -> RecordDict:
    """Write a downlink for the clients of one order; see `Packed`."""
    return written(Packed(downlink, request, dtype).message(request.clients, request.first))


class Reader:
    """Reads train messages back; what they share is read once."""

    def __init__(self) -> None:
        self._arrays: object = None
        self._header: dict[str, Any] = {}
        self._tensors: Tree = {}
        self._downlink = Downlink()

    def read(self, content: RecordDict) -> tuple[Downlink, TrainRequest]:
        """Read a train message.

        Raises:
            WireError: If a record, a field or a tensor is missing, or is not what it should be.
        """
        if isinstance(asked := held_by(content), Asked):
            return asked.read()
        with reading("a train message"):
            if self._arrays is None or content.get("arrays") is not self._arrays:
                self._read_shared(content)
            header, downlink = self._header, self._downlink
            vectors = read_vectors(content)
            request = _request(header, vectors, read_first(content))
            if header["own"]:
                layout = read_layout(header["own"], "own")
                rows = read_numbers(content, "own", 2, layout, header["kind"])
                if len(rows) != len(request.clients):
                    raise WireError(
                        f"{len(request.clients)} clients are asked, but tensors of their own came "
                        f"for {len(rows)}"
                    )
                own = layout.unpack(rows)
                downlink = described_downlink(header, self._tensors | own, own.keys())
            if "ranks" in vectors:
                downlink = replace(downlink, ranks=_ranks(vectors["ranks"], len(request.clients)))
        return downlink, request

    def _read_shared(self, content: RecordDict) -> None:
        """Read what all messages of an exchange share."""
        self._arrays = None  # a message that is refused is not remembered
        self._header = header = read_header(content)
        exactly(header, HEADER, "the header of a train message")
        layout = read_layout(header["layout"], "the layout")
        flat = read_numbers(content, "arrays", 1, layout, _kind(header["kind"], "its kind"))
        if len(flat) != layout.size:
            raise WireError(f"a message has {len(flat)} numbers, but its layout has {layout.size}")
        self._tensors = layout.unpack(flat)
        beside = read_layout(header[COEFFICIENTS], "the layout of coefficients")
        if beside.size:
            numbers = read_array(content, "arrays", COEFFICIENTS)
            if numbers.dtype != torch.float64 or tuple(numbers.shape) != (beside.size,):
                raise WireError(
                    f"the coefficients of a message are {tuple(numbers.shape)} of {numbers.dtype}; "
                    f"{beside.size} of float64 are wanted"
                )
            # Copied: products round by where a matrix lies.
            self._tensors |= {name: c.clone() for name, c in beside.unpack(numbers).items()}
        if not header["own"]:
            self._downlink = described_downlink(header, self._tensors, set())
        self._arrays = content["arrays"]


def _kind(value: object, what: str) -> str:
    """Read how numbers travel."""
    if value not in (FULL, *ROUNDED):
        raise WireError(f"{what} is {shown(value)}; one of {(FULL, *ROUNDED)} is wanted")
    return str(value)


def _request(header: Mapping[str, Any], vectors: Tree, first: int) -> TrainRequest:
    """Read what a train message says beside the downlink."""
    clients = vectors.get("clients", torch.zeros(0))
    if not len(clients) or (clients < 0).any() or (clients.diff() <= 0).any():
        raise WireError(
            f"a message is for the clients {shown(clients.tolist())}; ids from 0 on in ascending "
            "order are wanted"
        )
    if header["reduce"] not in WEIGHTS:
        raise WireError(f"reduce is {shown(header['reduce'])}; one of {WEIGHTS} is wanted")
    clip = header["clip"]
    if clip is not None and not real(clip, "clip") > 0:
        raise WireError(f"clip is {shown(clip)}; a positive number is wanted")
    return TrainRequest(
        whole(header["round"], "its round"),
        whole(header["version"], "its version"),
        real(header["rate_scale"], "rate_scale"),
        clients,
        first,
        header["reduce"],
        clip,
        _kind(header["uplink"], "uplink"),
        flag(header["feedback"], "feedback"),
    )


def _ranks(ranks: torch.Tensor, clients: int) -> torch.Tensor:
    """Read the rank budgets of the clients of a message (`rank_budgets.spans`)."""
    if len(ranks) == clients and (ranks > 0).all():
        return ranks
    pairs = ranks.reshape(-1, 2) if len(ranks) == 2 * clients else ranks.new_zeros(1, 2)
    if not ((pairs[:, 0] >= 0) & (pairs[:, 0] < pairs[:, 1])).all():
        raise WireError(
            f"the rank budgets of {clients} clients are {shown(ranks.tolist())}; for each a number "
            "from 1 on, or the first component and the one after the last, is wanted"
        )
    return pairs


def unpack_downlink(content: RecordDict) -> tuple[Downlink, TrainRequest]:
    """Read one train message back; see `Reader`."""
    return Reader().read(content)


def _sent(downlink: Downlink) -> dict[str, tuple[torch.Tensor, bool]]:
    """Every tensor that a downlink carries, by name, and whether it is one per client.

    Coefficients, which are float64 always, are `_coefficients`.
    """
    factors = downlink.factors().items()
    sent = {n: (f, differs(f)) for n, f in factors if isinstance(f, torch.Tensor)}
    for name, slot in downlink.trained().items():
        if isinstance(slot.start, torch.Tensor):
            sent[name] = (slot.start, differs(slot))
    for extra, tree in downlink.extras.items():
        sent |= {f"{extra}/{name}": (tensor, False) for name, tensor in tree.items()}
    return sent


def _coefficients(downlink: Downlink) -> Tree:
    """Collect the coefficients of the factors that are computed from the last link, by name."""
    factors = downlink.factors().items()
    return {name: f.coefficients for name, f in factors if isinstance(f, Derived)}
