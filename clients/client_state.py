"""What clients hold between rounds: tensors of their own, moments, control variates."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedraclora.protocol.downlink import opening_rows
from fedraclora.protocol.method import Adapter, Downlink, Factor, Trained
from fedraclora.protocol.recipes import RECIPES
from fedraclora.protocol.uplinks import finite
from fedraclora.run.client_state import ClientStore
from fedraclora.training.local_result import LocalResult
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.moments import begin_moments, blank_moments
from fedraclora.training.variates import blank_variates, mean_gradients, moved_by, seen
from fedraclora.tree import Layout, Tree, wide
from fedraclora.wire import TrainRequest


def held(
    store: ClientStore, downlink: Downlink, request: TrainRequest, base: Tree, local: LocalConfig
) -> tuple[Downlink, Tree]:
    """Read what the clients of a message hold.

    Args:
        store: Where they keep it.
        downlink: What is asked.
        request: Says of whom, and in which round.
        base: Global weights, where a client's own tensors begin.
        local: Says whether moments live on.

    Returns:
        The downlink, where what stays at a client starts from what it holds, and control variates
        are less the client's own; and the moments with which clients begin, [K, ...] by name.
    """
    dtype = wide(next(iter(base.values())).dtype)
    default: Tree = {}
    for name, slot in downlink.trained().items():
        if not slot.upload:
            opening = slot.opening()
            zeros = torch.zeros(slot.shape, dtype=dtype)
            default[name] = base.get(name, zeros) if opening is None else opening.to(dtype)
    steps = RECIPES[downlink.recipe].steps  # without, nothing has moments
    blank = blank_moments(local, downlink, dtype) if steps else {}
    variates = blank_variates(downlink, dtype) if downlink.variates else {}
    if not default and not blank and not variates:
        return downlink, {}
    link = downlink.link if local.moments == "link" else None
    found = store.read(request.clients, request.round_, default | blank | variates, link)
    moments = begin_moments({n: found[n] for n in blank}, local, downlink.link)
    if variates:
        own = seen({n: found[n] for n in variates}, downlink)
        corrections = {n: c.cpu() - own[n] for n, c in downlink.variates.items()}
        downlink = replace(downlink, variates=corrections)
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
    store: ClientStore,
    downlink: Downlink,
    request: TrainRequest,
    clients: torch.Tensor,
    result: LocalResult,
    base: Tree,
    local: LocalConfig,
    among: torch.Tensor | None = None,
) -> None:
    """Keep what stays; a client that diverged keeps what it had before.

    Args:
        store: Where.
        downlink: What these clients were asked, by `held`.
        request: Says in which round.
        clients: Ids, int64 [K].
        result: What came of it, as the server will see it: clipped where clients clip. A control
            variate of an update that the server knows otherwise would run apart from its own.
        base: Global weights.
        local: Local settings.
        among: Whose work is sent, bool [K]; None: everyone's.
    """
    own = {n: result.trained[n].cpu() for n, s in downlink.trained().items() if not s.upload}
    kept = own | {n: t.cpu() for n, t in result.moments.items()}
    if downlink.variates:
        kept |= _variates(store, downlink, request, clients, result, base, local)
    if not kept:
        return
    sound = torch.isfinite(result.losses)
    if among is not None:
        sound &= among
    for tensor in kept.values():
        sound &= finite(tensor.reshape(len(tensor), -1))
    if sound.any():
        store.stage(clients[sound], request.round_, {n: t[sound] for n, t in kept.items()})


def _variates(
    store: ClientStore,
    downlink: Downlink,
    request: TrainRequest,
    clients: torch.Tensor,
    result: LocalResult,
    base: Tree,
    local: LocalConfig,
) -> Tree:
    """Give the control variates of clients after a round, [K, ...]."""
    slots = downlink.uploaded()
    layout = Layout.of({n: torch.empty(s.shape) for n, s in slots.items()})
    start = layout.unpack(opening_rows(downlink, base, layout, torch.arange(len(clients))))
    end = {n: result.trained[n].cpu() for n in slots}
    rates = {n: local.rate(s.main, request.rate_scale) for n, s in slots.items()}
    directions = mean_gradients(start, end, local.steps or 1, rates)
    gradients = {n: g - downlink.variates[n].cpu() for n, g in directions.items()}
    blank = blank_variates(downlink, wide(next(iter(base.values())).dtype))
    return moved_by(store.read(clients, request.round_, blank), downlink, gradients)
