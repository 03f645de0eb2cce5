"""A downlink in plain JSON beside its numbers, and read back from both."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from fedraclora.errors import WireError
from fedraclora.protocol.derived import Derived
from fedraclora.protocol.method import Adapter, Downlink, Factor, Trained
from fedraclora.protocol.pool import Pool
from fedraclora.protocol.recipes import RECIPES
from fedraclora.sketch import Sketches, SketchSpec
from fedraclora.tree import Tree
from fedraclora.wire.fields import exactly, flag, listed, mapping, named, real, shown, whole
from fedraclora.wire.records import read_shape

ASKED = frozenset({"recipe", "arguments", "link", "extras", "adapters", "dense", "pools", "turn"})
ADAPTER = frozenset({"scale", "factors"})
POOL = frozenset({"spec", "count", "scale"})
TRAINED = frozenset({"role", "shape", "main", "upload", "started", "spec"})
SPEC = {field.name: str(field.type) for field in dataclasses.fields(SketchSpec)}


def describe(downlink: Downlink) -> dict[str, object]:
    """Describe a downlink in plain JSON, under the keys of `ASKED`; its numbers travel beside."""
    return {
        "recipe": downlink.recipe,
        "arguments": downlink.arguments,
        "link": downlink.link,
        "extras": {extra: list(tree) for extra, tree in downlink.extras.items()},
        "adapters": {
            w: {"scale": a.scale, "factors": {k: _describe_factor(f) for k, f in a.factors.items()}}
            for w, a in downlink.adapters.items()
        },
        "dense": {n: _describe_factor(slot) for n, slot in downlink.dense.items()},
        "pools": {w: _describe_pool(pool) for w, pool in downlink.pools.items()},
        "turn": downlink.turn,
    }


def described_downlink(
    header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], own: Collection[str]
) -> Downlink:
    """Build a downlink from its description and its tensors; ``own`` are one per client."""
    adapters = {}
    for weight, described in mapping(header["adapters"], "adapters").items():
        exactly(mapping(described, weight), ADAPTER, f"the adapter {weight}")
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
        pools={w: _pool(p, w) for w, p in mapping(header["pools"], "pools").items()},
        turn=None if header["turn"] is None else _turn(header["turn"], adapters),
    )
    extras = mapping(header["extras"], "extras").items()
    slots = downlink.trained()
    return replace(downlink, extras={e: _extra(e, names, tensors, slots) for e, names in extras})


def _describe_pool(pool: Pool) -> dict[str, object]:
    """Describe a pool in plain JSON; its parts are at the replica."""
    first, count = pool.sketches.first, pool.sketches.count
    return {"spec": vars(first), "count": count, "scale": pool.scale}


def _pool(described: object, weight: str) -> Pool:
    """Read the pool of a weight from `_describe_pool`."""
    where = f"the pool of {weight}"
    plain = mapping(described, where)
    exactly(plain, POOL, where)
    first = _spec(plain["spec"], where)
    count = whole(plain["count"], f"the number of parts of {where}", 1, first.dim // first.rank)
    return Pool(Sketches(first, count), real(plain["scale"], f"the scale of {where}"))


def _turn(described: object, adapters: Mapping[str, Adapter]) -> tuple[int, int, int]:
    """Read which sketch of a pool has its turn."""
    what = "the turn of a pool"
    numbers = listed(described, what)
    if len(numbers) != 3:
        raise WireError(f"{what} is {shown(numbers)}; a place, of how many, and an era are wanted")
    factors = [f for adapter in adapters.values() for f in adapter.factors.values()]
    room = [f.dim // f.rank for f in factors if isinstance(f, SketchSpec)]
    count = whole(numbers[1], what, 1, min(room, default=1))
    return whole(numbers[0], what, 0, count - 1), count, whole(numbers[2], what)


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


def _describe_factor(factor: Factor) -> dict[str, object]:
    """Describe a factor in plain JSON; its numbers travel beside."""
    if isinstance(factor, SketchSpec):
        return {"role": "sketched", "spec": vars(factor)}
    if isinstance(factor, Derived):
        return {"role": "derived", "spec": vars(factor.drawing)}
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
    """Read the factor or tensor ``key``; ``own``: its value is one per client."""
    plain = mapping(described, key)
    role = plain.get("role")
    if role == "sketched":
        exactly(plain, frozenset({"role", "spec"}), key)
        return _spec(plain["spec"], key)
    if role == "derived":
        exactly(plain, frozenset({"role", "spec"}), key)
        return _derived(_spec(plain["spec"], key), key, value)
    if role == "frozen":
        exactly(plain, frozenset({"role"}), key)
        if value is None or value.dim() != 2 + own:
            raise WireError("a frozen factor came without its numbers, or is no matrix")
        return value
    if role != "trained":
        raise WireError(f"{key} is {shown(role)}; sketched, derived, frozen or trained is wanted")
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


def _derived(drawing: SketchSpec, key: str, value: torch.Tensor | None) -> Derived:
    """Read what is to be computed from the last link."""
    if value is None or value.dtype != torch.float64 or value.dim() != 2:
        raise WireError(f"the coefficients of {key} are missing, or are no matrix of float64")
    if not len(value) <= drawing.dim or value.shape[1] <= drawing.rank:
        raise WireError(
            f"the coefficients of {key} have the shape {tuple(value.shape)}; a row for each "
            f"component, and more columns than the {drawing.rank} of its drawing, are wanted"
        )
    return Derived(value, drawing)


def _spec(described: object, key: str) -> SketchSpec:
    """Read a sketch back from JSON."""
    plain = mapping(described, f"the sketch of {key}")
    exactly(plain, frozenset(SPEC), f"the sketch of {key}")
    check = {"int": whole, "float": real, "str": named}
    read = {k: check[kind](plain[k], f"{k} of the sketch of {key}") for k, kind in SPEC.items()}
    return SketchSpec(**read)  # type: ignore[arg-type]
