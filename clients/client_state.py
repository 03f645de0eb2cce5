"""Read and write client state between rounds: personal tensors, moments, quantization residues."""

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
        store: Their store.
        downlink: The instructions.
        request: The request, with clients and round.
        base: Global weights, the start of personal tensors.
        local: Local settings, which say whether moments are kept.

    Returns:
        The downlink, where personal tensors start from the client's own, and control variates are
        the client's corrections; the initial moments, and the residues of quantized updates
        (`fedraclora.wire.feedback`), [K, ...] by name.

    Raises:
        WireError: If the downlink has additional tensors that no client reads.
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
    steps = downlink.program.trains  # without local steps, there are no moments
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
        store: Their store.
        downlink: These clients' instructions, from `restore`.
        request: The request, with the round.
        clients: Ids, int64 [K].
        result: Their result, as the server will see it: clipped if clients clip.
        base: Global weights.
        local: Local settings.
        residues: Residues of their quantized updates (`fedraclora.wire.feedback`), [K, ...].
        among: Clients whose update is sent, bool [K]; None: all.
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
    """Average the steps of each client's local training, [K, ...] by uploaded name."""
    slots = downlink.uploaded()
    layout = downlink.layout
    places = torch.arange(len(result.losses))
    start = layout.unpack(opening_rows(downlink, base, layout, places))
    end = {n: result.trained[n].cpu() for n in slots}
    rates = {n: local.rate(s.main, rate_scale) for n, s in slots.items()}
    return mean_gradients(start, end, local.steps or 1, rates)
