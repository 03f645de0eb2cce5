"""Downlinks and uplinks as Flower records: a JSON header and one flat array a message.

Many small arrays are what a Flower deployment is slow at. Bytes are counted here, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedraclora.chain import SEED_BYTES
from fedraclora.cohort import Trial
from fedraclora.errors import WireError
from fedraclora.method import Adapter, Downlink, Factor, Frozen, Sketched, Trained
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Layout, Tree, to_numpy

DTYPES = {"float32": torch.float32, "float64": torch.float64}
_VECTORS = {"clients": np.int64, "samples": np.int64, "steps": np.int64, "losses": np.float64}


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
    """

    round_: int
    version: int
    rate_scale: float
    clients: torch.Tensor


def payload_bytes(downlink: Downlink, cohort: int, itemsize: int) -> int:
    """Payload of a downlink to one client of a cohort: numbers that are sent, and 8 per seed."""
    numbers = sum(t.numel() // (cohort if own else 1) for t, own in _sent(downlink).values())
    sketches = sum(
        isinstance(f, Sketched) for a in downlink.adapters.values() for f in a.factors.values()
    )
    return numbers * itemsize + SEED_BYTES * sketches


def pack_downlink(downlink: Downlink, order: Order, places: slice, dtype: str) -> RecordDict:
    """Write a downlink for the clients at ``places`` of the cohort.

    Args:
        downlink: What to train.
        order: Round, version and clients.
        places: The clients' places in the cohort; cuts per-client values.
        dtype: Of the numbers on the wire: float32 or float64.
    """
    sent = {
        name: (tensor[places] if own else tensor).to(DTYPES[dtype])
        for name, (tensor, own) in _sent(downlink).items()
    }
    layout = Layout.of(sent)
    header = {
        "round": order.round_,
        "version": order.version,
        "rate_scale": order.rate_scale,
        "recipe": downlink.recipe,
        "arguments": downlink.arguments,
        "adapters": {
            w: {"scale": a.scale, "factors": {k: _describe(f) for k, f in a.factors.items()}}
            for w, a in downlink.adapters.items()
        },
        "dense": {n: _describe(slot) for n, slot in downlink.dense.items()},
        "layout": layout.shapes,
    }
    return _records(header, layout.pack(sent), {"clients": order.clients})


def unpack_downlink(content: RecordDict) -> tuple[Downlink, Order]:
    """Read a train message back."""
    header, flat, vectors = _read(content)
    tensors = Layout(tuple((n, tuple(s)) for n, s in header["layout"])).unpack(flat)
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
    downlink = Downlink(adapters, dense, header["recipe"], header["arguments"])
    order = Order(header["round"], header["version"], header["rate_scale"], vectors["clients"])
    return downlink, order


@dataclass(frozen=True)
class Reply:
    """What a chunk sent back: the rows of the clients that succeeded, and who failed."""

    round_: int
    version: int
    clients: torch.Tensor
    losses: torch.Tensor
    samples: torch.Tensor
    steps: torch.Tensor
    rows: torch.Tensor
    failures: dict[int, str]
    notes: list[str]


def pack_trial(
    trial: Trial | None,
    order: Order,
    clients: torch.Tensor,
    layout: Layout,
    failures: Mapping[int, str],
    notes: list[str],
) -> RecordDict:
    """Write what a chunk brought back; ``clients`` are those that succeeded."""
    header = {
        "round": order.round_,
        "version": order.version,
        "failures": {str(c): r for c, r in failures.items()},
        "notes": notes,
        "layout": layout.shapes,
    }
    if trial is None:  # every client of the chunk failed
        none = torch.zeros(0, dtype=torch.int64)
        trial = Trial({n: torch.empty(0, *s) for n, s in layout.shapes}, none.double(), none, none)
    rows = layout.pack({n: trial.trained[n] for n, _ in layout.shapes}, lead=1)
    vectors = {
        "clients": clients,
        "losses": trial.losses,
        "samples": trial.samples,
        "steps": trial.steps,
    }
    return _records(header, rows, vectors)


def unpack_trial(content: RecordDict, layout: Layout) -> Reply:
    """Read a reply back and hold it against what was asked.

    Raises:
        WireError: If the layout is not the one that was asked for, or numbers are missing.
    """
    header, rows, vectors = _read(content)
    sent = Layout(tuple((n, tuple(s)) for n, s in header["layout"]))
    if sent != layout:
        raise WireError(
            f"round {header['round']}: clients {vectors['clients'].tolist()} sent "
            f"{dict(sent.shapes)}, wanted {dict(layout.shapes)}"
        )
    if vectors.keys() != _VECTORS.keys():
        raise WireError(f"round {header['round']}: {[*vectors]} came, {[*_VECTORS]} were wanted")
    count = len(vectors["clients"])
    if tuple(rows.shape) != (count, layout.size) or {len(v) for v in vectors.values()} != {count}:
        raise WireError(
            f"round {header['round']}: rows {tuple(rows.shape)}, wanted {(count, layout.size)}, "
            f"with as many ids, losses and sizes; {[len(v) for v in vectors.values()]} came"
        )
    return Reply(
        header["round"],
        header["version"],
        vectors["clients"],
        vectors["losses"],
        vectors["samples"],
        vectors["steps"],
        rows,
        {int(c): r for c, r in header["failures"].items()},
        header["notes"],
    )


def _sent(downlink: Downlink) -> dict[str, tuple[torch.Tensor, bool]]:
    """Every tensor that a downlink carries, by name, and whether it is one per client."""
    sent = {}
    for weight, adapter in downlink.adapters.items():
        for label, factor in adapter.factors.items():
            if isinstance(factor, Frozen):
                sent[f"{weight}/{label}"] = (factor.value, factor.per_client)
    for name, slot in downlink.trained().items():
        if slot.start is not None:
            sent[name] = (slot.start, slot.per_client)
    return sent


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
        "started": factor.start is not None,
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
    start = value if described["started"] else None
    return Trained(shape, start, bool(described["main"]), bool(described["upload"]))


def _records(header: object, flat: torch.Tensor, vectors: Mapping[str, torch.Tensor]) -> RecordDict:
    arrays = ArrayRecord()
    arrays["flat"] = Array(to_numpy(flat))
    side = ConfigRecord({"header": json.dumps(header)})
    for name, vector in vectors.items():
        side[name] = to_numpy(vector).tobytes()
    return RecordDict({"arrays": arrays, "config": side})


def _read(content: RecordDict) -> tuple[dict[str, Any], torch.Tensor, Tree]:
    config, arrays = content.get("config"), content.get("arrays")
    if not isinstance(config, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise WireError(f"a message holds {list(content)}; wanted the records config and arrays")
    header = json.loads(str(config["header"]))
    flat = torch.from_numpy(arrays["flat"].numpy())
    vectors = {
        n: torch.from_numpy(np.frombuffer(config[n], kind).copy())  # type: ignore[arg-type]
        for n, kind in _VECTORS.items()
        if n in config
    }
    return header, flat, vectors
