"""Read and write client state between rounds: own tensors, moments, quantization residues."""

from __future__ import annotations

import math

import torch

from fedraclora.errors import WireError
from fedraclora.protocol.instructions import opening_rows
from fedraclora.protocol.method import RoundInstructions
from fedraclora.protocol.program import LocalResult
from fedraclora.protocol.uplinks import finite
from fedraclora.run.client_state import ClientStore
from fedraclora.training.extras.variates import (
    EXTRAS,
    begin_variates,
    blank_variates,
    end_variates,
    variates_of,
)
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.materialize import start_from
from fedraclora.training.moments import begin_moments, blank_moments
from fedraclora.training.optimizer import mean_gradients
from fedraclora.tree import Tree, wide
from fedraclora.wire.exchange import TrainRequest
from fedraclora.wire.feedback import blank_residues


def restore(
    store: ClientStore,
    downlink: RoundInstructions,
    request: TrainRequest,
    base: Tree,
    local: LocalConfig,
) -> tuple[RoundInstructions, Tree, Tree]:
    """Read the state of the clients of a message.

    Args:
        store: Where they keep it.
        downlink: What is asked.
        request: Says of whom, and in which round.
        base: Global weights, where a client's own tensors begin.
        local: Says whether moments live on.

    Returns:
        The downlink, where what stays at a client starts from what it holds, and control variates
        are what it adds to gradients; the moments with which clients begin, and what rounding left
        of what they sent (`fedraclora.wire.feedback`), [K, ...] by name.

    Raises:
        WireError: If something travels beside the downlink that no client reads.
    """
    if unknown := downlink.extras.keys() - {*EXTRAS}:
        raise WireError(
            f"the server sent the extras {sorted(unknown)}, which this client does not know "
            f"(it knows {[*EXTRAS]}). Run the server and the clients from one release"
        )
    dtype = wide(next(iter(base.values())).dtype)
    default: Tree = {}
    for name, slot in downlink.trained().items():
        if not slot.upload:
            opening = slot.opening()
            zeros = torch.zeros(slot.shape, dtype=dtype)
            default[name] = base.get(name, zeros) if opening is None else opening.to(dtype)
    steps = downlink.program.trains  # without, nothing has moments
    blank = blank_moments(local, downlink, dtype) if steps else {}
    variates = blank_variates(downlink, dtype) if variates_of(downlink) else {}
    rounded = blank_residues(downlink, dtype) if request.feedback else {}
    initial = default | blank | variates | rounded
    if not initial:
        return downlink, {}, {}
    link = downlink.link if local.optimizer_state == "merge" else None
    found = store.read(request.clients, request.round_, initial, link)
    moments = begin_moments({n: found[n] for n in blank}, local, downlink.link)
    if variates:
        downlink = begin_variates({n: found[n] for n in variates}, downlink)
    downlink = start_from({n: found[n] for n in default}, downlink)
    return downlink, moments, {n: found[n] for n in rounded}


def keep(
    store: ClientStore,
    downlink: RoundInstructions,
    request: TrainRequest,
    clients: torch.Tensor,
    result: LocalResult,
    base: Tree,
    local: LocalConfig,
    *,
    residues: Tree | None = None,
    among: torch.Tensor | None = None,
) -> None:
    """Store the new client state; a client that diverged keeps its previous state.

    Args:
        store: Where.
        downlink: What these clients were asked, by `restore`.
        request: Says in which round.
        clients: Ids, int64 [K].
        result: What came of it, as the server will see it: clipped where clients clip.
        base: Global weights.
        local: Local settings.
        residues: What rounding left of what they send (`fedraclora.wire.feedback`), [K, ...].
        among: Whose work is sent, bool [K]; None: everyone's.
    """
    own = {n: result.trained[n].cpu() for n, s in downlink.trained().items() if not s.upload}
    stored = own | {n: t.cpu() for n, t in result.moments.items()} | (residues or {})
    if variates_of(downlink):
        blank = blank_variates(downlink, wide(next(iter(base.values())).dtype))
        before = store.read(clients, request.round_, blank)
        directions = _directions(downlink, request.rate_scale, result, base, local)
        stored |= end_variates(before, downlink, directions)
    if not stored:
        return
    sound = result.losses < math.inf  # a NaN is not
    if among is not None:
        sound &= among
    for tensor in stored.values():
        sound &= finite(tensor.reshape(len(tensor), -1))
    if sound.any():
        store.stage(clients[sound], request.round_, {n: t[sound] for n, t in stored.items()})


def _directions(
    downlink: RoundInstructions,
    rate_scale: float,
    result: LocalResult,
    base: Tree,
    local: LocalConfig,
) -> Tree:
    """Average the steps of each client's local training, [K, ...] by name of what they send."""
    slots = downlink.uploaded()
    layout = downlink.layout
    places = torch.arange(len(result.losses))
    start = layout.unpack(opening_rows(downlink, base, layout, places))
    end = {n: result.trained[n].cpu() for n in slots}
    rates = {n: local.rate(s.main, rate_scale) for n, s in slots.items()}
    return mean_gradients(start, end, local.steps or 1, rates)
