"""Base weights that a run folder does not hold twice: rebuilt from the chain, or built anew.

The first link of the chain holds the initial weights, but for those that a package or the hub has:
they are named with their digest, and built anew from the model's config where they are read. The
checkpoint of a large model leaves to the chain what its links hold in fewer bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedraclora.binding import bind
from fedraclora.data.locate import HUB, PACKAGE
from fedraclora.errors import CheckpointError, FedRacLoraError
from fedraclora.models import MODELS
from fedraclora.protocol.link import Plan, apply_link
from fedraclora.tree import Tree, digest
from fedraclora.weights.chain import read_link
from fedraclora.weights.links import read_links

LARGE = 16 * 2**20  # bytes of base weights; below, every file stands alone
CARRIED = "carried|"  # of the tensors of a link: what the method carries, where it changed


@dataclass(frozen=True)
class ModelSource:
    """A pretrained model of a package or the hub, from which a run begins.

    Attributes:
        model: Its group of the config.
        weights: What it has of the initial weights: the head, which is drawn, is not among them.
    """

    model: Mapping[str, object]
    weights: Tree

    def refer(self, base: Tree) -> tuple[Tree, dict[str, object]]:
        """Part initial weights into those to keep and a description of the others.

        Args:
            base: The initial weights; those that a method has changed are kept.
        """
        there = {n: t for n, t in self.weights.items() if base.get(n) is t}
        kept = {n: t for n, t in base.items() if n not in there}
        if is_small(there):
            return dict(base), {}
        model = dict(self.model)
        said = {"model": model, "sha256": digest(there), "names": list(there), "order": list(base)}
        return kept, {"elsewhere": said}


def source_of(model: Mapping[str, object], head: tuple[str, ...], base: Tree) -> ModelSource | None:
    """Give the source of a model that is a package's or the hub's; None for others.

    Args:
        model: The group of the config.
        head: Name prefixes of its head.
        base: The weights of the model as it was built.
    """
    path = model.get("path")
    if not isinstance(path, str) or not path.startswith((PACKAGE, HUB)):
        return None
    inside = tuple(f"{name}." for name in head)
    return ModelSource(model, {n: t for n, t in base.items() if not n.startswith(inside)})


def is_small(base: Tree) -> bool:
    """Tell whether weights are so few that every file may have them."""
    return sum(t.nbytes for t in base.values()) < LARGE


def initial_weights(tensors: Tree, meta: Mapping[str, Any], path: Path) -> Tree:
    """Give the initial weights from the first link of a chain.

    Args:
        tensors: Of the link.
        meta: Of the link.
        path: Where it lies, for messages.

    Raises:
        CheckpointError: If weights that lie elsewhere are not there, or are others now.
    """
    base = {n: t for n, t in tensors.items() if not n.startswith(CARRIED)}
    said = meta.get("elsewhere")
    if said is None:
        return base
    named = f"the model at model.path={said['model'].get('path')}, from which this run began"
    try:
        built = _built(json.dumps(said["model"]))
    except FedRacLoraError as error:
        raise CheckpointError(f"{path} refers to {named}: {error}") from error
    there = {n: built[n] for n in said["names"] if n in built}
    if digest(there) != said["sha256"]:
        raise CheckpointError(
            f"{path} refers to {named}, which has other weights now; install the version that the "
            "run began from"
        )
    return {n: base[n] if n in base else there[n] for n in said["order"]}


@lru_cache(maxsize=1)
def _built(model: str) -> Tree:
    """Build a pretrained model; nothing but its head depends on data and seed."""
    group: dict[str, object] = json.loads(model)
    network = bind("model", MODELS, group, shape=(), classes=2, seed=0)().model
    return {n: p.detach() for n, p in network.named_parameters()}


def base_at(chain: Path, round_: int, plan: Plan) -> Tree:
    """Rebuild the base weights after a round from the chain.

    Raises:
        CheckpointError: If a link is damaged or missing.
    """
    base, last = Tree(), -1
    for number, tensors, meta in read_links(chain):
        if number > round_ or meta.get("first", number) != last + 1:
            break
        if number:
            base = apply_link(base, read_link(tensors, meta), plan)
        else:
            base = initial_weights(tensors, meta, chain / f"{number:06d}.safetensors")
        last = number
    if last < round_:
        raise CheckpointError(
            f"{chain} reaches round {last}, and the checkpoint beside it rests on round {round_}: "
            "restore the files from a copy"
        )
    return base


def checkpoint_base(stored: Tree, meta: Mapping[str, Any], chain: Path, plan: Plan) -> Tree:
    """Give the base weights of a checkpoint, what it has left to the chain from there.

    Args:
        stored: Those that it holds.
        meta: Its meta data.
        chain: The folder of the chain beside it.
        plan: Of the run.
    """
    if (order := meta.get("base_order")) is None:
        return stored
    rebuilt = base_at(chain, meta["round"], plan)
    return {n: stored[n] if n in stored else rebuilt[n] for n in order}
