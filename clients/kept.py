"""What clients hold between rounds: tensors of their own, and moments of their optimisers."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedraclora.aggregate import finite
from fedraclora.clientstore import ClientStore
from fedraclora.method import Adapter, Downlink, Factor, Trained
from fedraclora.recipe import RECIPES
from fedraclora.training.moments import begin_moments, blank_moments
from fedraclora.training.optimiser import LocalConfig
from fedraclora.training.trial import Trial
from fedraclora.tree import Tree
from fedraclora.wire import Order


def held(
    store: ClientStore, downlink: Downlink, order: Order, base: Tree, local: LocalConfig
) -> tuple[Downlink, Tree]:
    """Read what the clients of a message hold.

    Args:
        store: Where they keep it.
        downlink: What is asked.
        order: Says of whom, and in which round.
        base: Global weights, where a client's own tensors begin.
        local: Says whether moments live on.

    Returns:
        The downlink, where what stays at a client starts from what it holds; and the moments with
        which clients begin, [K, ...] by name.
    """
    dtype = next(iter(base.values())).dtype
    default: Tree = {}
    for name, slot in downlink.trained().items():
        if not slot.upload:
            opening = slot.opening()
            zeros = torch.zeros(slot.shape, dtype=dtype)
            default[name] = base.get(name, zeros) if opening is None else opening.to(dtype)
    steps = RECIPES[downlink.recipe].steps  # without, nothing has moments
    blank = blank_moments(local, downlink, dtype) if steps else {}
    if not default and not blank:
        return downlink, {}
    found = store.read(order.clients, order.round_, default | blank)
    moments = begin_moments({n: found[n] for n in blank}, local, downlink.link)
    return start_from({n: found[n] for n in default}, downlink), moments


def start_from(own: Tree, downlink: Downlink) -> Downlink:
    """Let the tensors that are named start from each client's own, [K, ...]."""
    if not own:
        return downlink

    def start(name: str, factor: Factor) -> Factor:
        named = isinstance(factor, Trained) and name in own
        return replace(factor, start=own[name]) if named else factor  # type: ignore[arg-type]

    adapters = {
        w: Adapter({k: start(f"{w}/{k}", f) for k, f in a.factors.items()}, a.scale)
        for w, a in downlink.adapters.items()
    }
    dense = {n: replace(s, start=own.get(n, s.start)) for n, s in downlink.dense.items()}
    return replace(downlink, adapters=adapters, dense=dense)


def keep(
    store: ClientStore, downlink: Downlink, order: Order, clients: torch.Tensor, trial: Trial
) -> None:
    """Keep what stays; a client that diverged keeps what it had before."""
    own = {n: trial.trained[n].cpu() for n, s in downlink.trained().items() if not s.upload}
    kept = own | {n: t.cpu() for n, t in trial.moments.items()}
    if not kept:
        return
    sound = torch.isfinite(trial.losses)
    for tensor in kept.values():
        sound &= finite(tensor.reshape(len(tensor), -1))
    if sound.any():
        store.stage(clients[sound], order.round_, {n: t[sound] for n, t in kept.items()})
