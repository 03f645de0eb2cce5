"""Read the sequence of merges in a run folder: initial weights and the updates of rounds.

The first file has the initial weights, except those of a package or the hub: these are referred to
by name and digest, and rebuilt from the model's config when read. The checkpoint of a large model
omits weights that the merges contain in fewer bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from fedraclora.binding import bind
from fedraclora.data.locate import HUB, PACKAGE
from fedraclora.errors import CheckpointError, FedRacLoraError
from fedraclora.models import MODELS
from fedraclora.protocol.method import Counters, Plan, State, apply_link
from fedraclora.tree import Tree, below, digest
from fedraclora.weights.chain import read_link, read_plan
from fedraclora.weights.links import read_links

LARGE = 16 * 2**20  # bytes of base weights; smaller ones are stored in every file
CARRIED = "carried|"  # prefix of a merge's tensors: the method's own tensors, if changed


@dataclass(frozen=True)
class ModelSource:
    """Identify the pretrained model of a package or the hub from which a run begins.

    Attributes:
        model: Its group of the config.
        weights: Its part of the initial weights, without the head, which is drawn.
    """

    model: Mapping[str, object]
    weights: Tree

    def split_reference(self, base: Tree) -> tuple[Tree, dict[str, object]]:
        """Split initial weights into those to store and a reference to the others.

        Args:
            base: The initial weights; those that a method has changed are kept.
        """
        there = {n: t for n, t in self.weights.items() if base.get(n) is t}
        kept = {n: t for n, t in base.items() if n not in there}
        if is_small(there):
            return dict(base), {}
        model = dict(self.model)
        reference = {
            "model": model,
            "sha256": digest(there),
            "names": list(there),
            "order": list(base),
        }
        return kept, {"elsewhere": reference}


def source_of(model: Mapping[str, object], head: tuple[str, ...], base: Tree) -> ModelSource | None:
    """Return the source of a model from a package or the hub; None for others.

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
    """Return whether weights are small enough to be stored in every file."""
    return sum(t.nbytes for t in base.values()) < LARGE


def initial_weights(tensors: Tree, meta: Mapping[str, Any], path: Path) -> Tree:
    """Return the initial weights from the first merge file.

    Args:
        tensors: The file's tensors.
        meta: The file's metadata.
        path: Its path, for messages.

    Raises:
        CheckpointError: If weights stored elsewhere are missing, or have changed.
    """
    base = {n: t for n, t in tensors.items() if not n.startswith(CARRIED)}
    reference = meta.get("elsewhere")
    if reference is None:
        return base
    named = f"the model at model.path={reference['model'].get('path')}, from which this run began"
    key = json.dumps(reference["model"], sort_keys=True)
    for find in (_in_use, _built):
        try:
            found = find(key)
        except FedRacLoraError as error:
            raise CheckpointError(f"{path} refers to {named}: {error}") from error
        there = {n: found[n] for n in reference["names"] if n in found}
        if digest(there) == reference["sha256"]:
            return {n: base[n] if n in base else there[n] for n in reference["order"]}
    raise CheckpointError(
        f"{path} refers to {named}, whose weights have changed. Install the version that "
        "the run began from"
    )


_models = WeakValueDictionary[str, nn.Module]()  # by the config group that they were built from


def note_model(group: Mapping[str, object], model: nn.Module) -> None:
    """Note a model that is in use, so that a run that began from it builds no second one."""
    _models[json.dumps(group, sort_keys=True, default=str)] = model


def _in_use(key: str) -> Tree:
    model = _models.get(key)
    return {} if model is None else {n: p.detach() for n, p in model.named_parameters()}


@lru_cache(maxsize=1)
def _built(model: str) -> Tree:
    """Build a pretrained model; only its head depends on data and seed."""
    group: dict[str, object] = json.loads(model)
    network = bind("model", MODELS, group, shape=(), classes=2, seed=0)().model
    return {n: p.detach() for n, p in network.named_parameters()}


def read_states(folder: Path, kind: type[Counters]) -> Iterator[tuple[int, State, dict[str, Any]]]:
    """Yield the states of a run from its initial state on.

    Args:
        folder: The run folder.
        kind: The class of the method's counters.

    Yields:
        The round of each merge (the last one of a compacted file), the state after it with the
        merge, and the merge's metadata.

    Raises:
        CheckpointError: If a file is damaged, missing or of another run.
    """
    chain, last, state = folder / "chain", -1, State({}, Plan({}))
    for number, tensors, meta in read_links(chain):
        if meta.get("first", number) > last + 1:
            path = chain / f"{last + 1:06d}.safetensors"
            raise CheckpointError(f"{path} is missing. Restore it from a copy")
        link = None
        if number == 0:
            base = initial_weights(tensors, meta, chain / "000000.safetensors")
            state = State(base, read_plan(meta["plan"]))
        else:
            link = read_link(tensors, meta)
            base = apply_link(state.base, link, state.plan)
        kept = {n: t for n, t in state.carried.items() if n not in meta.get("gone", ())}
        carried, counters = kept | below(tensors, CARRIED), kind.read(meta["counters"])
        last, state = number, State(base, state.plan, carried, counters, link)
        yield number, state, meta


def state_after(folder: Path, round_: int, kind: type[Counters]) -> tuple[State, dict[str, Any]]:
    """Return the state of a run after a round; arguments as for `read_states`.

    Returns:
        The state, and the metadata of the last merge.

    Raises:
        CheckpointError: If a file is damaged, missing or of another run.
    """
    chain, last, state, metadata = folder / "chain", -1, State({}, Plan({})), dict[str, Any]()
    beyond = False
    for number, after, meta in read_states(folder, kind):
        if beyond := number > round_:
            break
        last, state, metadata = number, replace(after, link=None), meta
    if last < 0:
        raise CheckpointError(
            f"round {round_} cannot be read: {chain} holds no rounds, since they were not "
            "kept (output.chain=false) or were lost. Restore the folder from a copy, if "
            "there is one"
        )
    if last < round_ and not beyond:
        missing = chain / f"{last + 1:06d}.safetensors"
        raise CheckpointError(
            f"{chain} reaches round {last}, but not round {round_}: {missing} is missing. "
            "Restore it from a copy"
        )
    return state, metadata


def checkpoint_base(stored: Tree, meta: Mapping[str, Any], folder: Path) -> Tree:
    """Return the base weights of a checkpoint, with omitted ones from the merge files.

    Args:
        stored: The weights in the checkpoint.
        meta: Its metadata.
        folder: The run folder.
    """
    if (order := meta.get("base_order")) is None:
        return stored
    rebuilt = state_after(folder, meta["round"], Counters)[0].base
    return {n: stored[n] if n in stored else rebuilt[n] for n in order}
