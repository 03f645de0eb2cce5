"""What goes to clients as a message: a downlink, and who is asked what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fedraclora.errors import WireError
from fedraclora.protocol.coding import NONE, ZSTD
from fedraclora.protocol.cohorts import WEIGHTINGS
from fedraclora.protocol.downlink import Downlink
from fedraclora.protocol.quantised import FULL, ROUNDED
from fedraclora.tree import Layout, Tree
from fedraclora.wire.described import ASKED, describe, described_downlink
from fedraclora.wire.exchange import Ask, TrainRequest, coefficients, sent_tensors
from fedraclora.wire.fields import exactly, flag, reading, real, shown, whole
from fedraclora.wire.records import (
    Content,
    Fields,
    array_record,
    header_record,
    message_header,
    of_message,
    packed_numbers,
    read_array,
    read_first,
    read_layout,
    read_numbers,
    read_vectors,
    round_of,
    tree_record,
    vector_record,
)
from fedraclora.wire.secagg import read_stage

WEIGHTS = (None, *WEIGHTINGS)
COEFFICIENTS = "coefficients"  # of factors that are computed from the last link, in float64
REQUEST = ("round", "version", "rate_scale", "reduce", "clip", "uplink", "feedback")
UNUSUAL: dict[str, Any] = {"measure": None, "coding": NONE}  # said where they are something else
HEADER = ASKED | {*REQUEST, "kind", "layout", "own", COEFFICIENTS}
WHEN = (None, "before", "after")
APART = ("clients", "first", "places")  # of a request: not the same for all of an exchange


class AskWriter:
    """Writes asks as messages; what those of an exchange share is written once."""

    def __init__(self) -> None:
        self._of: tuple[Downlink, object] | None = None
        self._shared: Content = {}
        self._own: tuple[Tree, Layout] = ({}, Layout(()))

    def write(self, ask: Ask) -> Content:
        """Write an ask."""
        request, sent = ask.request, ask.downlink
        if sent is None:
            found: Content = {
                "config": header_record({"round": request.round_, "failures": {}}),
                "arrays": array_record(torch.empty(0)),
                "chunk": vector_record({"clients": request.clients}),
            }
        else:
            asked = ask.kind, {n: v for n, v in vars(request).items() if n not in APART}
            if self._of is None or self._of[0] is not sent or self._of[1] != asked:
                self._share(ask, sent)
                self._of = sent, asked
            found = {**self._shared, **self._apart(ask, sent)}
        if ask.stage is not None:
            found["secure"] = Fields(ask.stage.texts)
        return found

    def _share(self, ask: Ask, downlink: Downlink) -> None:
        """Write what the cohort shares."""
        request, sent = ask.request, sent_tensors(downlink)
        shared = {n: t for n, (t, own) in sent.items() if not own}
        own = {n: t for n, (t, own) in sent.items() if own}
        layout, own_layout = Layout.of(shared), Layout.of(own, skip=1)
        numbers = coefficients(downlink)
        beside = Layout.of(numbers)
        said = {**vars(request), "round": request.round_}
        header = {
            **{name: said[name] for name in REQUEST},
            "kind": ask.kind,
            **describe(downlink),
            "layout": layout.shapes,
            "own": own_layout.shapes,
            COEFFICIENTS: beside.shapes,
            **{name: said[name] for name, usual in UNUSUAL.items() if said[name] != usual},
        }
        arrays = {"flat": packed_numbers(layout.pack(shared), layout, ask.kind, ask.coding)}
        if beside.size:
            arrays[COEFFICIENTS] = beside.pack(numbers)
        self._own = own, own_layout
        self._shared = {"config": header_record(header), "arrays": tree_record(arrays)}

    def _apart(self, ask: Ask, downlink: Downlink) -> Content:
        """Write what is these clients' own."""
        request, (own, layout) = ask.request, self._own
        places = request.order if ask.apart else torch.arange(len(request.clients))
        vectors = {"clients": request.clients}
        if request.places is not None:
            vectors["places"] = request.places
        if downlink.ranks is not None:
            vectors["ranks"] = downlink.ranks[places]
        chunk = vector_record(vectors)
        chunk["first"] = request.first
        found: Content = {"chunk": chunk}
        if own:
            rows = layout.pack({n: t[places] for n, t in own.items()}, lead=1)
            found["own"] = array_record(packed_numbers(rows, layout, ask.kind))
        return found


class AskReader:
    """Reads asks back from messages; what these share is read once."""

    def __init__(self) -> None:
        self._arrays: object = None
        self._header: dict[str, Any] = {}
        self._tensors: Tree = {}
        self._downlink = Downlink()

    def read(self, content: Content) -> Ask:
        """Read an ask.

        Raises:
            WireError: If a record, a field or a tensor is missing, or is not what it should be.
        """
        stage = read_stage(content)
        with reading("a train message"):
            if stage is not None and stage.name != "masked":
                clients = torch.tensor(sorted(stage.data), dtype=torch.int64)
                return Ask(TrainRequest(round_of(content), 0, 1.0, clients), stage=stage)
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
        return Ask(request, downlink, header["kind"], stage=stage)

    def _read_shared(self, content: Content) -> None:
        """Read what all messages of an exchange share."""
        self._arrays = None  # a message that is refused is not remembered
        self._header = header = message_header(content)
        known = HEADER | (header.keys() & UNUSUAL.keys())
        exactly(header, known, "the header of a train message")
        layout = read_layout(header["layout"], "the layout")
        kind = _kind(header["kind"], "its kind")
        with of_message(content):
            flat = read_numbers(content, "arrays", 1, layout, kind)
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
    places = vectors.get("places")
    if places is not None and not (
        len(places) == len(clients) and places[0] == first and (places.diff() > 0).all()
    ):
        raise WireError(
            f"the places of {len(clients)} clients in the cohort are {shown(places.tolist())}; one "
            f"for each, from {first} on in ascending order, is wanted"
        )
    if header["reduce"] not in WEIGHTS:
        raise WireError(f"reduce is {shown(header['reduce'])}; one of {WEIGHTS} is wanted")
    clip = header["clip"]
    if clip is not None and not real(clip, "clip") > 0:
        raise WireError(f"clip is {shown(clip)}; a positive number is wanted")
    measure, coding = (header.get(name, usual) for name, usual in UNUSUAL.items())
    if measure not in WHEN:
        raise WireError(f"measure is {shown(measure)}; one of {WHEN} is wanted")
    if coding not in (NONE, ZSTD):
        raise WireError(f"coding is {shown(coding)}; {ZSTD} is wanted, or nothing")
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
        measure,
        places,
        coding,
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
