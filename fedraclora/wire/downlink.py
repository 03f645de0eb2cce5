"""What goes to clients: a downlink, packed once for the whole cohort, and who is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from flwr.app import RecordDict

from fedraclora.errors import WireError
from fedraclora.protocol.downlink import differs
from fedraclora.protocol.method import Adapter, Downlink, Factor, Trained
from fedraclora.protocol.recipes import RECIPES
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Layout, Tree
from fedraclora.weights.chain import SEED_BYTES
from fedraclora.wire.fields import (
    exactly,
    flag,
    listed,
    mapping,
    named,
    reading,
    real,
    shown,
    whole,
)
from fedraclora.wire.records import (
    DTYPES,
    array_record,
    header_record,
    read_array,
    read_first,
    read_header,
    read_layout,
    read_shape,
    read_vectors,
    vector_record,
)
from fedraclora.wire.unwritten import Records, held_by, unwritten, written

WEIGHTS = (None, "examples", "uniform")
ASKED = frozenset({"recipe", "arguments", "link", "extras", "adapters", "dense"})
HEADER = ASKED | {"round", "version", "rate_scale", "reduce", "clip", "layout", "own"}
ADAPTER = frozenset({"scale", "factors"})
TRAINED = frozenset({"role", "shape", "main", "upload", "started", "spec"})
SPEC = {field.name: str(field.type) for field in dataclasses.fields(SketchSpec)}


def uplink_layout(downlink: Downlink) -> Layout:
    """Names and shapes of what each client sends back."""
    return Layout(tuple((n, s.shape) for n, s in downlink.uploaded().items()))


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
    starts = [slot.start for slot in downlink.trained().values()]
    drawn = [isinstance(f, SketchSpec) for f in [*downlink.factors().values(), *starts]]
    return numbers * itemsize + SEED_BYTES * sum(drawn)


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
        dtype: Of the numbers on the wire: float32 or float64.
    """

    def __init__(self, downlink: Downlink, request: TrainRequest, dtype: str) -> None:
        self.downlink, self.request = downlink.to(DTYPES[dtype]), request
        self.sent = _sent(self.downlink)
        self.own = {n: t for n, (t, own) in self.sent.items() if own}
        self.own_layout = Layout.of(self.own, skip=1)

    @cached_property
    def shared(self) -> Records:
        """The records of what the cohort shares."""
        downlink, request = self.downlink, self.request
        shared = {n: t for n, (t, own) in self.sent.items() if not own}
        layout = Layout.of(shared)
        header = {
            "round": request.round_,
            "version": request.version,
            "rate_scale": request.rate_scale,
            "reduce": request.reduce,
            "clip": request.clip,
            "recipe": downlink.recipe,
            "arguments": downlink.arguments,
            "link": downlink.link,
            "extras": {extra: list(tree) for extra, tree in downlink.extras.items()},
            "adapters": {
                w: {"scale": a.scale, "factors": {k: _describe(f) for k, f in a.factors.items()}}
                for w, a in downlink.adapters.items()
            },
            "dense": {n: _describe(slot) for n, slot in downlink.dense.items()},
            "layout": layout.shapes,
            "own": self.own_layout.shapes,
        }
        return {"config": header_record(header), "arrays": array_record(layout.pack(shared))}

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
            records["own"] = array_record(rows)
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
                rows = _floats(content, "own", 2)
                if len(rows) != len(request.clients):
                    raise WireError(
                        f"{len(request.clients)} clients are asked, but tensors of their own came "
                        f"for {len(rows)}"
                    )
                own = read_layout(header["own"], "own").unpack(rows)
                downlink = _downlink(header, self._tensors | own, own.keys())
            if "ranks" in vectors:
                downlink = replace(downlink, ranks=_ranks(vectors["ranks"], len(request.clients)))
        return downlink, request

    def _read_shared(self, content: RecordDict) -> None:
        """Read what all messages of an exchange share."""
        self._arrays = None  # a message that is refused is not remembered
        self._header = header = read_header(content)
        exactly(header, HEADER, "the header of a train message")
        flat = _floats(content, "arrays", 1)
        layout = read_layout(header["layout"], "the layout")
        if len(flat) != layout.size:
            raise WireError(f"a message has {len(flat)} numbers, but its layout has {layout.size}")
        self._tensors = layout.unpack(flat)
        if not header["own"]:
            self._downlink = _downlink(header, self._tensors, set())
        self._arrays = content["arrays"]


def _floats(content: RecordDict, record: str, axes: int) -> torch.Tensor:
    """Read an array of the numbers that travel."""
    found = read_array(content, record)
    if found.dim() != axes or found.dtype not in DTYPES.values():
        raise WireError(
            f"the record {record} has the shape {tuple(found.shape)} and the type {found.dtype}; "
            f"{axes} axes and one of {[*DTYPES]} are wanted"
        )
    return found


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


def _downlink(
    header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], own: Collection[str]
) -> Downlink:
    """Build a downlink from its description and its tensors; ``own`` are one per client."""
    adapters = {}
    for weight, described in mapping(header["adapters"], "adapters").items():
        exactly(
            mapping(described, weight), frozenset({"scale", "factors"}), f"the adapter {weight}"
        )
        factors = {}
        for label, factor in mapping(described["factors"], f"the factors of {weight}").items():
            key = f"{weight}/{label}"
            factors[label] = _factor(factor, key, tensors.get(key), key in own)
        adapters[weight] = Adapter(factors, real(described["scale"], f"the scale of {weight}"))
    dense = {}
    for key, described in mapping(header["dense"], "dense").items():
        slot = _factor(described, key, tensors.get(key), key in own)
        if not isinstance(slot, Trained):
            raise WireError(f"the dense tensor {key} is frozen, but only trained ones are sent")
        dense[key] = slot
    if header["recipe"] not in RECIPES:
        raise WireError(
            f"the recipe of a message is {shown(header['recipe'])}; {sorted(RECIPES)} are known"
        )
    arguments = mapping(header["arguments"], "arguments")
    downlink = Downlink(
        adapters,
        dense,
        header["recipe"],
        {key: real(value, f"the argument {key}") for key, value in arguments.items()},
        link=whole(header["link"], "its link"),
    )
    extras = mapping(header["extras"], "extras").items()
    slots = downlink.trained()
    return replace(downlink, extras={e: _extra(e, names, tensors, slots) for e, names in extras})


def _extra(
    extra: str, names: object, tensors: Mapping[str, torch.Tensor], slots: Mapping[str, Trained]
) -> Tree:
    """Read what an extra sends beside some of the tensors that are trained."""
    found = {}
    for name in (named(each, f"the extra {extra}") for each in listed(names, extra)):
        value = tensors.get(f"{extra}/{name}")
        if value is None or name not in slots or tuple(value.shape) != slots[name].shape:
            raise WireError(
                f"the extra {extra} of a message names {name}, but no tensor of that name is "
                "trained, or the numbers for it are missing or of another shape"
            )
        found[name] = value
    return found


def _sent(downlink: Downlink) -> dict[str, tuple[torch.Tensor, bool]]:
    """Every tensor that a downlink carries, by name, and whether it is one per client."""
    factors = downlink.factors().items()
    sent = {n: (f, differs(f)) for n, f in factors if isinstance(f, torch.Tensor)}
    for name, slot in downlink.trained().items():
        if isinstance(slot.start, torch.Tensor):
            sent[name] = (slot.start, differs(slot))
    for extra, tree in downlink.extras.items():
        sent |= {f"{extra}/{name}": (tensor, False) for name, tensor in tree.items()}
    return sent


def _describe(factor: Factor) -> dict[str, object]:
    """Describe a factor in plain JSON; its numbers travel in the flat array."""
    if isinstance(factor, SketchSpec):
        return {"role": "sketched", "spec": vars(factor)}
    if isinstance(factor, torch.Tensor):
        return {"role": "frozen"}
    return {
        "role": "trained",
        "shape": factor.shape,
        "main": factor.main,
        "upload": factor.upload,
        "started": isinstance(factor.start, torch.Tensor),
        "spec": vars(factor.start) if isinstance(factor.start, SketchSpec) else None,
    }


def _factor(described: object, key: str, value: torch.Tensor | None, own: bool) -> Factor:
    """Read the factor or tensor ``key`` from `_describe`; ``own``: its value is one per client."""
    plain = mapping(described, key)
    role = plain.get("role")
    if role == "sketched":
        exactly(plain, frozenset({"role", "spec"}), key)
        return _spec(plain["spec"], key)
    if role == "frozen":
        exactly(plain, frozenset({"role"}), key)
        if value is None or value.dim() != 2 + own:
            raise WireError("a frozen factor came without its numbers, or is no matrix")
        return value
    if role != "trained":
        raise WireError(f"{key} is {shown(role)}; sketched, frozen or trained is wanted")
    exactly(plain, TRAINED, key)
    shape = read_shape(plain["shape"], f"the shape of {key}")
    start: torch.Tensor | SketchSpec | None = None
    if flag(plain["started"], "started"):
        start = value
        if value is None or tuple(value.shape[own:]) != shape:
            raise WireError(f"{key} came without the numbers from which it starts")
    elif plain["spec"] is not None:
        start = _spec(plain["spec"], key)
        drawn = (start.rank, start.dim) if start.side == "right" else (start.dim, start.rank)
        if drawn != shape:
            raise WireError(
                f"{key} has the shape {shape}, but is to start as a drawing of shape {drawn}"
            )
    return Trained(shape, start, flag(plain["main"], "main"), flag(plain["upload"], "upload"))


def _spec(described: object, key: str) -> SketchSpec:
    """Read a sketch back from JSON."""
    plain = mapping(described, f"the sketch of {key}")
    exactly(plain, frozenset(SPEC), f"the sketch of {key}")
    check = {"int": whole, "float": real, "str": named}
    read = {k: check[kind](plain[k], f"{k} of the sketch of {key}") for k, kind in SPEC.items()}
    return SketchSpec(**read)  # type: ignore[arg-type]
