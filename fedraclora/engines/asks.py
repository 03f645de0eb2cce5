"""Write requests to clients as Flower's records, and read them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedraclora.codec import join, split
from fedraclora.engines.records import (
    array_record,
    header_record,
    of_message,
    read_array,
    read_json,
    read_vectors,
    record_of,
    tree_record,
    vector_record,
)
from fedraclora.errors import WireError
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.protocol.quantized import FULL, decode, encode
from fedraclora.tree import Layout, Tree
from fedraclora.wire.asked import check_instructions, check_kind, check_request, ranks_of
from fedraclora.wire.exchange import DTYPES, Ask, OwnPart, Stage, TrainRequest, shared_of
from fedraclora.wire.fields import layout_of, reading, shown, whole_number
from fedraclora.wire.secagg import check_stage

COEFFICIENTS = "coefficients"  # names of coefficients of computed factors, in float64
FIELDS = {"request", "downlink", "kind", "layout", "own", COEFFICIENTS}
OWN = ("clients", "first", "places")  # parts of a request that differ within an exchange
SECURE = "secure"  # the record of a stage of secure aggregation
Records = dict[str, ArrayRecord | ConfigRecord | MetricRecord]


class AskWriter:
    """Writes requests as records; parts that an exchange shares are encoded once."""

    def __init__(self) -> None:
        self._of: tuple[RoundInstructions | None, object] | None = None
        self._shared: Records = {}

    def write(self, ask: Ask) -> RecordDict:
        """Write a request."""
        request = ask.request
        asked = ask.kind, {n: v for n, v in vars(request).items() if n not in OWN}
        if self._of is None or self._of[0] is not ask.downlink or self._of[1] != asked:
            self._shared, self._of = _written(ask), (ask.downlink, asked)
        return RecordDict({**self._shared, **_own(OwnPart.of(ask), ask.kind)})


def _written(ask: Ask) -> Records:
    """Write the part that all clients of an exchange share."""
    shared = shared_of(ask)
    _, plain = split(shared.request)
    header: dict[str, Any] = {"request": {n: v for n, v in plain.items() if n not in OWN}}
    if shared.downlink is None:
        return {"config": header_record(header)}
    tensors, header["downlink"] = split(shared.downlink)
    exact = {n: t for n, t in tensors.items() if n.endswith(f"/{COEFFICIENTS}")}
    numbers = {n: t for n, t in tensors.items() if n not in exact}
    own = OwnPart.of(ask).rows
    layout, beside = Layout.of(numbers), Layout.of(exact)
    header |= {"kind": ask.kind, "layout": layout.shapes, COEFFICIENTS: beside.shapes}
    header["own"] = Layout.of(own, skip=1).shapes
    arrays = {"flat": _packed(layout.pack(numbers), layout, ask.kind, ask.coding)}
    if beside.size:
        arrays[COEFFICIENTS] = beside.pack(exact)
    return {"config": header_record(header), "arrays": tree_record(arrays)}


def _own(part: OwnPart, kind: str) -> Records:
    """Write the part for these clients only."""
    request = part.request
    vectors = {"clients": request.clients, "places": request.places, "ranks": part.ranks}
    chunk = vector_record({n: vector for n, vector in vectors.items() if vector is not None})
    chunk["first"] = request.first
    found: Records = {"chunk": chunk}
    if part.rows:
        layout = Layout.of(part.rows, skip=1)
        found["own"] = array_record(_packed(layout.pack(part.rows, lead=1), layout, kind))
    if part.stage is not None:
        found[SECURE] = header_record(split(part.stage)[1])
    return found


def _packed(numbers: torch.Tensor, layout: Layout, kind: str, coding: str = NONE) -> torch.Tensor:
    """Pack numbers [..., P] in their format for sending."""
    return numbers if kind == FULL else encode(numbers, layout.sizes, kind, coding=coding)


def read_ask(records: RecordDict) -> Ask:
    """Read a request.

    Raises:
        WireError: If a record, a field or a tensor is missing or invalid.
    """
    with reading("a train message"):
        return _Reader(records).ask()


@dataclass
class _Reader:
    """Read the request in one message."""

    records: RecordDict

    def ask(self) -> Ask:
        header, vectors = read_json(self.records, "config"), read_vectors(self.records)
        wanted = FIELDS if header.keys() != {"request"} else {"request"}
        if header.keys() != wanted:
            raise WireError(f"the message has the fields {shown([*header])}, expected {wanted}")
        request = self._request(header["request"], vectors)
        stage, count = self._stage(request.clients), len(request.clients)
        if wanted == {"request"}:
            return Ask(request, stage=stage)
        kind = check_kind(header["kind"], "its kind")
        downlink = self._downlink(header, kind)
        own, rows = layout_of(header["own"], "own"), Tree()
        if own.shapes:
            numbers = self._numbers("own", 2, own, kind)
            if len(numbers) != count:
                raise WireError(
                    f"the message asks {count} clients, but has own tensors for {len(numbers)}"
                )
            rows = own.unpack(numbers)
        if strange := rows.keys() - downlink.named.keys():
            raise WireError(
                f"the message has {shown(sorted(strange))} for single clients, "
                "but no such tensor differs between clients"
            )
        ranks = ranks_of(vectors["ranks"], count) if "ranks" in vectors else None
        ask = OwnPart(request, rows, ranks, stage).joined(Ask(request, downlink, kind))
        check_instructions(ask.own, rows.keys())
        return ask

    def _request(self, plain: Any, vectors: Tree) -> TrainRequest:
        """Read the clients and kind of a request."""
        first = record_of(self.records, "chunk", ConfigRecord).get("first")
        own: dict[str, Any] = {name: [] for name in ("clients", "places") if name in vectors}
        said = {**plain, **own, "first": whole_number(first, "the place of its first client")}
        return check_request(join(TrainRequest, vectors, said))

    def _stage(self, clients: torch.Tensor) -> Stage | None:
        if SECURE not in self.records:
            return None
        stage = check_stage(join(Stage, {}, read_json(self.records, SECURE)))
        if not stage.data.keys() <= {*clients.tolist()}:
            raise WireError(
                f"the message is for the clients {shown(clients.tolist())}, but its stage of "
                f"secure aggregation is for {shown([*stage.data])}"
            )
        return stage

    def _downlink(self, header: dict[str, Any], kind: str) -> RoundInstructions:
        """Read the part that all clients of an exchange share."""
        layout = layout_of(header["layout"], "the layout")
        with of_message(self.records):
            flat = self._numbers("arrays", 1, layout, kind)
        if len(flat) != layout.size:
            raise WireError(
                f"the message has {len(flat)} numbers, expected {layout.size} by its layout"
            )
        tensors = layout.unpack(flat)
        beside = layout_of(header[COEFFICIENTS], "the layout of coefficients")
        if beside.size:
            exact = read_array(self.records, "arrays", COEFFICIENTS)
            if exact.dtype != torch.float64 or tuple(exact.shape) != (beside.size,):
                raise WireError(
                    f"the coefficients of the message are {tuple(exact.shape)} of "
                    f"{exact.dtype}, expected {beside.size} of float64"
                )
            # Copied: products round by the alignment of a matrix.
            tensors |= {name: c.clone() for name, c in beside.unpack(exact).items()}
        return join(RoundInstructions, tensors, header["downlink"])

    def _numbers(self, record: str, axes: int, layout: Layout, kind: str) -> torch.Tensor:
        """Read an array of numbers in their format for sending, [k, P] or [P]."""
        found = read_array(self.records, record)
        if kind != FULL:
            found = decode(found, layout.sizes, kind, axes)
        if found.dim() != axes or found.dtype not in DTYPES.values():
            raise WireError(
                f"the record {record} has the shape {tuple(found.shape)} and the type "
                f"{found.dtype}, expected {axes} axes and one of {[*DTYPES]}"
            )
        return found
