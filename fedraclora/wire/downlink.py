"""What goes to clients: a downlink, packed once for the whole cohort, and who is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.app import RecordDict

from fedraclora.chain import SEED_BYTES
from fedraclora.errors import WireError
from fedraclora.method import Adapter, Downlink, Factor, Frozen, Sketched, Trained
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Layout, Tree
from fedraclora.wire.records import (
    DTYPES,
    array_record,
    header_record,
    read_array,
    read_header,
    read_layout,
    read_vectors,
    vector_record,
)

VARIATE = "variate/"  # of the names of control variates among tensors


def uplink_layout(downlink: Downlink) -> Layout:
    """Names and shapes of what each client sends back."""
    return Layout(tuple((n, s.shape) for n, s in downlink.uploaded().items()))


@dataclass(frozen=True)
class Order:
    """What a train message says beside the downlink.

    Attributes:
        round_: From 1.
        version: Version of the base weights that the clients must hold.
        rate_scale: Of the step sizes in this round.
        clients: Ids, int64 [k].
        first: Place of the first of them in the cohort.
        reduce: None for one row per client; ``examples`` or ``uniform`` for weighted sums of
            blocks of clients (`fedraclora.aggregate`), where ``first`` opens a block.
        clip: The greatest norm of the update that a client may send; None: any.
    """

    round_: int
    version: int
    rate_scale: float
    clients: torch.Tensor
    first: int = 0
    reduce: str | None = None
    clip: float | None = None


def payload_bytes(downlink: Downlink, cohort: int, itemsize: int) -> int:
    """Payload of a downlink to one client of a cohort: numbers that are sent, and 8 per seed."""
    numbers = sum(t.numel() // (cohort if own else 1) for t, own in _sent(downlink).values())
    factors = [f for a in downlink.adapters.values() for f in a.factors.values()]
    drawn = (isinstance(s.start, SketchSpec) for s in downlink.trained().values())
    seeds = sum(isinstance(f, Sketched) for f in factors) + sum(drawn)
    return numbers * itemsize + SEED_BYTES * seeds


class Packed:
    """A downlink as records; what the cohort shares is written once.

    Args:
        downlink: What to train.
        order: Round, version and step sizes.
        dtype: Of the numbers on the wire: float32 or float64.
    """

    def __init__(self, downlink: Downlink, order: Order, dtype: str) -> None:
        sent = _sent(downlink)
        shared = {n: t.to(DTYPES[dtype]) for n, (t, own) in sent.items() if not own}
        self.own = {n: t.to(DTYPES[dtype]) for n, (t, own) in sent.items() if own}
        layout = Layout.of(shared)
        self.own_layout = Layout.of(self.own, skip=1)
        self.ranks = downlink.ranks
        header = {
            "round": order.round_,
            "version": order.version,
            "rate_scale": order.rate_scale,
            "reduce": order.reduce,
            "clip": order.clip,
            "recipe": downlink.recipe,
            "arguments": downlink.arguments,
            "link": downlink.link,
            "variates": list(downlink.variates),
            "lifted": downlink.lifted,
            "adapters": {
                w: {"scale": a.scale, "factors": {k: _describe(f) for k, f in a.factors.items()}}
                for w, a in downlink.adapters.items()
            },
            "dense": {n: _describe(slot) for n, slot in downlink.dense.items()},
            "layout": layout.shapes,
            "own": self.own_layout.shapes,
        }
        self.config, self.arrays = header_record(header), array_record(layout.pack(shared))

    def message(self, clients: torch.Tensor, first: int) -> RecordDict:
        """Write the content of a message to clients at the places ``first, first + 1, ...``."""
        places = slice(first, first + len(clients))
        vectors = {"clients": clients}
        if self.ranks is not None:
            vectors["ranks"] = self.ranks[places]
        chunk = vector_record(vectors)
        chunk["first"] = first
        content = RecordDict({"config": self.config, "arrays": self.arrays, "chunk": chunk})
        if self.own:
            rows = self.own_layout.pack({n: t[places] for n, t in self.own.items()}, lead=1)
            content["own"] = array_record(rows)
        return content


def pack_downlink(downlink: Downlink, order: Order, dtype: str) -> RecordDict:
    """Write a downlink for the clients of one order; see `Packed`."""
    return Packed(downlink, order, dtype).message(order.clients, order.first)


class Reader:
    """Reads train messages back; what they share is read once."""

    def __init__(self) -> None:
        self._arrays: object = None
        self._header: dict[str, Any] = {}
        self._tensors: Tree = {}
        self._downlink = Downlink()

    def read(self, content: RecordDict) -> tuple[Downlink, Order]:
        """Read a train message.

        Raises:
            WireError: If a record or a tensor is missing.
        """
        if self._arrays is None or content.get("arrays") is not self._arrays:
            self._header = header = read_header(content)
            self._tensors = read_layout(header["layout"]).unpack(read_array(content, "arrays"))
            if not header["own"]:
                self._downlink = _downlink(header, self._tensors)
            self._arrays = content["arrays"]
        header, downlink = self._header, self._downlink
        if header["own"]:
            own = read_layout(header["own"]).unpack(read_array(content, "own"))
            downlink = _downlink(header, self._tensors | own)
        chunk, vectors = content["chunk"], read_vectors(content)
        if "ranks" in vectors:
            ranks = vectors["ranks"]
            pairs = len(ranks) == 2 * len(vectors["clients"])
            downlink = replace(downlink, ranks=ranks.reshape(-1, 2) if pairs else ranks)
        order = Order(
            header["round"],
            header["version"],
            header["rate_scale"],
            vectors["clients"],
            int(str(chunk["first"])),
            header["reduce"],
            header["clip"],
        )
        return downlink, order


def unpack_downlink(content: RecordDict) -> tuple[Downlink, Order]:
    """Read one train message back; see `Reader`."""
    return Reader().read(content)


def _downlink(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Downlink:
    """Build a downlink from its description and the tensors that the cohort shares."""
    adapters = {
        w: Adapter(
            {k: _factor(f, tensors.get(f"{w}/{k}")) for k, f in a["factors"].items()}, a["scale"]
        )
        for w, a in header["adapters"].items()
    }
    dense = {}
    for name, described in header["dense"].items():
        slot = _factor(described, tensors.get(name))
        if not isinstance(slot, Trained):
            raise WireError(f"dense tensor {name} is not trained")
        dense[name] = slot
    return Downlink(
        adapters,
        dense,
        header["recipe"],
        header["arguments"],
        link=int(header["link"]),
        variates={n: tensors[f"{VARIATE}{n}"] for n in header["variates"]},
        lifted=bool(header["lifted"]),
    )


def _sent(downlink: Downlink) -> dict[str, tuple[torch.Tensor, bool]]:
    """Every tensor that a downlink carries, by name, and whether it is one per client."""
    sent = {}
    for weight, adapter in downlink.adapters.items():
        for label, factor in adapter.factors.items():
            if isinstance(factor, Frozen):
                sent[f"{weight}/{label}"] = (factor.value, factor.per_client)
    for name, slot in downlink.trained().items():
        if isinstance(slot.start, torch.Tensor):
            sent[name] = (slot.start, slot.per_client)
    return sent | {f"{VARIATE}{n}": (t, False) for n, t in downlink.variates.items()}


def _describe(factor: Factor) -> dict[str, object]:
    """Describe a factor in plain JSON; its numbers travel in the flat array."""
    if isinstance(factor, Sketched):
        return {"role": "sketched", "spec": vars(factor.spec)}
    if isinstance(factor, Frozen):
        return {"role": "frozen"}
    return {
        "role": "trained",
        "shape": factor.shape,
        "main": factor.main,
        "upload": factor.upload,
        "started": isinstance(factor.start, torch.Tensor),
        "spec": vars(factor.start) if isinstance(factor.start, SketchSpec) else None,
    }


def _factor(described: Mapping[str, Any], value: torch.Tensor | None) -> Factor:
    """Undo `_describe`."""
    if described["role"] == "sketched":
        return Sketched(SketchSpec(**described["spec"]))
    if described["role"] == "frozen":
        if value is None:
            raise WireError("a frozen factor came without its numbers")
        return Frozen(value)
    shape = tuple(described["shape"])
    start: torch.Tensor | SketchSpec | None = value if described["started"] else None
    if described["spec"] is not None:
        start = SketchSpec(**described["spec"])
    return Trained(shape, start, bool(described["main"]), bool(described["upload"]))
