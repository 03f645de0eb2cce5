"""A downlink in plain JSON beside its numbers, and read back from both."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from fedraclora.codec import join, split
from fedraclora.errors import WireError
from fedraclora.protocol.factor import Factor
from fedraclora.protocol.method import Downlink
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree
from fedraclora.wire.fields import reading, whole
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
        paths = f"{factor}/numbers", f"{factor}/coefficients", f"dense/{name}/numbers"
        found |= dict.fromkeys((*paths, f"extras/{name}"), tensor)
    with reading("a downlink"):
        downlink = join(Downlink, found, header["downlink"])
        _check(downlink)
        for key, each in downlink.named.items():
            _check_factor(key, each, key in own)
            if key in downlink.dense and not each.trained:
                raise WireError(f"{key} is frozen; of no adapter, only what is trained is sent")
    return downlink


def _check(downlink: Downlink) -> None:
    """Reject what types do not."""
    whole(downlink.link, "its link")
    downlink.program.check(downlink)
    slots = downlink.trained()
    for extra, tree in downlink.extras.items():
        for name, value in tree.items():
            if name not in slots or tuple(value.shape) != slots[name].shape:
                raise WireError(
                    f"the extra {extra} of a message names {name}, but no tensor of that name and "
                    "shape is trained"
                )


def _check_sketch(first: SketchSpec, count: int, what: str) -> None:
    whole(first.seed, f"the seed of {what}")
    whole(count, f"the number of parts of {what}", 1, max(1, first.dim // first.rank))


def _check_factor(key: str, factor: Factor, own: bool) -> None:
    """Reject what a factor or tensor says of itself that does not fit.

    Args:
        key: Its name.
        factor: As it was read.
        own: Whether its numbers are one for each client.
    """
    numbers, drawing, C = factor.numbers, factor.sketch, factor.coefficients
    shape = read_shape([*factor.shape], f"the shape of {key}")
    said = (numbers is not None) + (drawing is not None)
    if said > 1 or (not said and not factor.trained) or (C is not None and drawing is None):
        raise WireError(f"{key} is to be numbers, a drawing or trained from zero, one of these")
    if drawing is not None:
        _check_sketch(drawing, factor.count, key)
    if C is not None and drawing is not None:
        if C.dtype != torch.float64 or C.dim() != 2:
            raise WireError(f"the coefficients of {key} are no matrix of float64")
        if not len(C) <= drawing.dim or C.shape[1] <= drawing.rank:
            raise WireError(
                f"the coefficients of {key} have the shape {tuple(C.shape)}; a row for each "
                f"component, and more columns than the {drawing.rank} of its drawing, are wanted"
            )
    inferred = replace(factor, trained=False, shape=())
    found = inferred.shape if numbers is None else tuple(numbers.shape[own:])
    if (said and found != shape) or (not factor.trained and len(shape) != 2):
        raise WireError(f"{key} is to be of the shape {shape}, but came in the shape {found}")
