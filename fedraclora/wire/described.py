"""A downlink in plain JSON beside its numbers, and read back from both."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from fedraclora.codec import join, split
from fedraclora.errors import WireError
from fedraclora.protocol.derived import Derived
from fedraclora.protocol.method import Downlink, Factor, Trained
from fedraclora.protocol.recipes import RECIPES
from fedraclora.sketch import Sketches, SketchSpec
from fedraclora.tree import Tree
from fedraclora.wire.fields import reading, shown, whole
from fedraclora.wire.records import read_shape

ASKED = frozenset({"downlink"})


def describe(downlink: Downlink) -> dict[str, object]:
    """Describe a downlink in plain JSON, under the keys of `ASKED`; its numbers travel beside."""
    return {"downlink": split(replace(downlink, ranks=None))[1]}


def described_downlink(
    header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], own: Collection[str]
) -> Downlink:
    """Build a downlink from its description and its tensors; ``own`` are one per client.

    Raises:
        WireError: Naming the field, what came and what was wanted.
    """
    found: Tree = {}
    for name, tensor in tensors.items():  # by the paths at which the codec looks for them
        weight, _, label = name.rpartition("/")
        factor = f"adapters/{weight}/factors/{label}"
        paths = factor, f"{factor}/start", f"{factor}/coefficients", f"dense/{name}/start"
        found |= dict.fromkeys((*paths, f"extras/{name}"), tensor)
    with reading("a downlink"):
        downlink = join(Downlink, found, header["downlink"])
        _check(downlink)
        for key, each in {**downlink.factors(), **downlink.dense}.items():
            _check_factor(key, each, key in own)
    return downlink


def _check(downlink: Downlink) -> None:
    """Reject what types do not."""
    if downlink.recipe not in RECIPES:
        raise WireError(
            f"the recipe of a message is {shown(downlink.recipe)}; {sorted(RECIPES)} are known"
        )
    whole(downlink.link, "its link")
    for weight, pool in downlink.pools.items():
        _check_sketch(pool.sketches, f"the pool of {weight}")
    if downlink.turn is not None:
        place, count, era = downlink.turn
        room = [f.dim // f.rank for f in downlink.factors().values() if isinstance(f, SketchSpec)]
        whole(count, "the number of turns of a pool", 1, min(room, default=1))
        whole(place, "the turn of a pool", 0, count - 1)
        whole(era, "the era of a pool")
    slots = downlink.trained()
    for extra, tree in downlink.extras.items():
        for name, value in tree.items():
            if name not in slots or tuple(value.shape) != slots[name].shape:
                raise WireError(
                    f"the extra {extra} of a message names {name}, but no tensor of that name and "
                    "shape is trained"
                )


def _check_sketch(sketch: SketchSpec | Sketches, what: str) -> None:
    first, count = (sketch.first, sketch.count) if isinstance(sketch, Sketches) else (sketch, 1)
    whole(first.seed, f"the seed of {what}")
    whole(count, f"the number of parts of {what}", 1, max(1, first.dim // first.rank))


def _check_factor(key: str, factor: Factor, own: bool) -> None:
    """Reject numbers of a factor or tensor that do not fit; ``own``: they are one per client."""
    if isinstance(factor, torch.Tensor):
        if factor.dim() != 2 + own:
            raise WireError(f"the frozen factor {key} is no matrix")
    elif isinstance(factor, Derived):
        value, drawing = factor.coefficients, factor.drawing
        _check_sketch(drawing, key)
        if value.dtype != torch.float64 or value.dim() != 2:
            raise WireError(f"the coefficients of {key} are no matrix of float64")
        if not len(value) <= drawing.dim or value.shape[1] <= drawing.rank:
            raise WireError(
                f"the coefficients of {key} have the shape {tuple(value.shape)}; a row for each "
                f"component, and more columns than the {drawing.rank} of its drawing, are wanted"
            )
    elif isinstance(factor, Trained):
        start, shape = factor.start, read_shape([*factor.shape], f"the shape of {key}")
        drawn = shape
        if isinstance(start, SketchSpec):
            _check_sketch(start, key)
            drawn = (start.rank, start.dim) if start.side == "right" else (start.dim, start.rank)
        elif start is not None:
            drawn = tuple(start.shape[own:])
        if drawn != shape:
            raise WireError(f"{key} has the shape {shape}, but is to start in the shape {drawn}")
    else:
        _check_sketch(factor, key)
