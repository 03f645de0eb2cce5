"""Collect a trained model, with the factors of its change, for an export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from itertools import islice
from pathlib import Path

import torch

from fedraclora.config.build import build_task, plan_of
from fedraclora.config.run_config import RunConfig
from fedraclora.data.locate import model_source
from fedraclora.data.task import Task
from fedraclora.errors import ConfigError
from fedraclora.export.trained import TrainedModel, name_classes, put_weights
from fedraclora.lowrank.algebra import Product, sum_products, truncated_product
from fedraclora.lowrank.dora import magnitude_of
from fedraclora.models.built import dequantize
from fedraclora.narrow_weight import BITS, base_name, dense
from fedraclora.protocol.factor import past_name, weight_of
from fedraclora.protocol.link import Link, Plan, matrices
from fedraclora.protocol.method import Draw, Method, State
from fedraclora.run.folder import provenance
from fedraclora.run.rebuild import state_at
from fedraclora.strategies.shared.layerwise import LayerMethod
from fedraclora.strategies.wrappers import method_of
from fedraclora.strategies.wrappers.around import MethodWrapper
from fedraclora.strategies.wrappers.dora import Dora
from fedraclora.tree import Tree, digest
from fedraclora.weights.chain import read_link
from fedraclora.weights.links import read_links

Known = dict[str, Product | None]  # None: a weight whose change is not known by factors


def trained_model(
    config: RunConfig,
    folder: Path | None,
    task: Task,
    effective: Callable[[], Tree],
    facts: Mapping[str, object],
    round_: int | None = None,
) -> TrainedModel:
    """Collect a run's trained model.

    Args:
        config: The config of the run.
        folder: Its folder; None: it ran in memory.
        task: Its task, the model at W_0.
        effective: Returns the weights, for a run in memory.
        facts: Facts for the card; the digest of the weights is added.
        round_: The round of the weights, from the stored merges; None: the end.

    Raises:
        ConfigError: If clients keep a factor of every adapter, so that there is no complete model,
            or if the run is in memory and the round is not the last.
        CheckpointError: If a file is missing or damaged, or the run did not reach the round.
    """
    method = method_of(config)
    if method.client_state:
        raise ConfigError(
            f"the clients of {type(config.method).__name__} keep a factor of every adapter "
            "private, so the server has no complete model to export"
        )
    changes: dict[str, Product] = {}
    magnitudes: Tree = {}
    held = dict(task.model.named_parameters())
    model = dequantize(copy.deepcopy(task.model).cpu().eval())
    if folder is None:
        plan = plan_of(config, task)
        start = {n: p.detach().cpu().clone() for n, p in held.items()}
        weights = effective()
    else:
        state = state_at(folder, round_, method)
        plan = state.plan
        draw = Draw(config.seed)
        weights = method.weights(state, draw)
        start, changes = _from_start(folder, config, method, state, round_)
        if isinstance(method, Dora):
            magnitudes = {name: state.carried[magnitude_of(name)] for name in plan.targets}
    start, weights = dense(start), dense(weights)
    model.to(next(iter(weights.values())).dtype)  # a narrow base becomes wide with the added change
    put_weights(model, weights)
    name_classes(model, task.reading.get("classes"))
    source, tokenizer = _sources(config)
    return TrainedModel(
        model,
        start,
        plan.targets,
        plan.dense,
        changes,
        magnitudes,
        source=source,
        tokenizer=tokenizer,
        config=config.plain,
        facts={**facts, "weights_digest": digest(weights), **provenance()},
        warnings=_warnings(plan, held),
    )


def _from_start(
    folder: Path, config: RunConfig, method: Method, state: State, round_: int | None
) -> tuple[Tree, dict[str, Product]]:
    """Return W_0, and the factors of each weight whose change is known by factors."""
    draw, known, past = Draw(config.seed), Known(), Tree()
    links = [n for n, _, _ in islice(read_links(folder / "chain"), 1)]
    if links != [0]:  # the run stored no merges
        return {
            n: p.detach().cpu() for n, p in build_task(config).task.model.named_parameters()
        }, {}
    before = state_at(folder, 0, method)
    start = method.weights(before, draw)
    ends = _current_update(method, before, draw), _current_update(method, state, draw)
    if ends[0] is None or ends[1] is None:
        return start, {}
    for part in ends[0].parts():
        minus = {n: replace(t, scale=-t.scale) for n, t in part.terms.items()}
        _collect(known, Link(minus), state.plan, past)
    for number, tensors, meta in read_links(folder / "chain"):
        if number and (round_ is None or number <= round_):
            _collect(known, read_link(tensors, meta), state.plan, past)
    _collect(known, ends[1], state.plan, past)
    return start, {name: change for name, change in known.items() if change is not None}


def _current_update(method: Method, state: State, draw: Draw) -> Link | None:
    """Return the method's current update of its weights; None if it does not define one."""
    if isinstance(method, MethodWrapper):
        return _current_update(*method.at(state), draw)
    if type(method).weights is Method.weights:
        return Link()
    if isinstance(method, LayerMethod) and type(method).weights is LayerMethod.weights:
        return method.current_update(state, draw)
    return None


def _collect(known: Known, link: Link, plan: Plan, past: Tree) -> None:
    """Add a merge to the known changes: its low-rank terms beside the earlier ones.

    Args:
        known: The known changes. Modified.
        link: The merge.
        plan: The plan of the run.
        past: The last trained factors, by name in base weights. Modified.
    """
    for part in link.parts():
        for name, term in part.terms.items():
            first, *rest = matrices(term.with_past(past.get(past_name(name))))
            if term.kept is not None:
                past[past_name(name)] = term.kept
            if not rest:
                known[name] = None
                continue
            left = first * term.scale
            right = reduce(torch.matmul, rest)
            if name not in known:
                known[name] = left, right
            elif (old := known[name]) is not None:
                known[name] = _bounded(sum_products(old, (left, right)))
        for name, value in part.dense.items():
            if name in plan.targets:
                known[name] = None
            elif weight_of(name) is not None:
                past[name] = value


def _bounded(change: Product) -> Product:
    """Compress a sum of products when it has twice as many components as its matrix can have."""
    left, right = change
    most = min(left.shape[0], right.shape[1])
    if left.shape[1] <= 2 * most:
        return change
    u, s, vt = truncated_product(left, right, most)
    return u * s, vt


def _sources(config: RunConfig) -> tuple[str | None, str | None]:
    """Return the sources of the pretrained model and its tokenizer, for ``from_pretrained``."""
    path, data = config.model.get("path"), config.data
    name, root = data.get("tokenizer"), data.get("root")
    source = model_source(str(path), key="model.path", root=None)[0] if path else None
    if not name:
        return source, source
    folder = None if root is None else str(root)
    return source, model_source(str(name), key="data.tokenizer", root=folder)[0] or source


def _warnings(plan: Plan, held: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    found = []
    if plan.local:
        found.append(
            f"Each client kept {', '.join(plan.local)} to itself (head=personal): here they are as "
            "they were before the first round, so train them on your own samples before you use "
            "the model."
        )
    if narrow := sorted({base_name(w) for w in held.values()} & (BITS.keys() | {"bfloat16"})):
        found.append(
            f"The run held weights in {narrow[0]} (model.base). Merged weights are those, "
            "dequantized, and what was trained; an adapter is exact beside them."
        )
    return tuple(found)
