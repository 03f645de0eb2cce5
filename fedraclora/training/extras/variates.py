"""Control variates (SCAFFOLD): correct a client's gradients by its difference from the mean.

    local step    y <- y - eta (g(y) + D_k),   D_k = c - c_k
    client        c_k <- c_k + (g_k - c),      g_k = (x - y) / (K eta): the mean of its K steps
    server        c <- c + |S|/N (mean of g_k over S - c)

The client keeps c_k; the server sends c with the round. The server needs only the mean of y: all
clients take the same number of plain SGD steps, so the mean of g_k is (x - mean y) / (K eta). That
saves half of the paper's uplink, which also sends c_k. y is the client's upload, after clipping if
it clips: c stays the mean of the c_k only if both are formed from the same y.

A factor that is trained from round to round under the same coordinates has its variate in them: B
under one A, both factors if they are kept, full weights. Under a **fresh sketch** a variate of B
refers to the previous sketch. There c and c_k are kept as dense estimates C of the gradient of the
weight (m x n); a round sees the part beside its sketch A (s the scale):

    c   = s C A^T                               what comes down, [m, r]
    C_k <- C_k + (1/s) (g_k - c) (A A^T)^+ A    on the row space of A the new estimate, else the old

and the same for C. With one A for ever both forms are the same algorithm. The price is m n numbers
at each client and at the server; the uplink stays as it is.

References:
    Karimireddy et al., *SCAFFOLD*, ICML 2020, arXiv 1910.06378, algorithm 1, option II. The dense
    estimates under fresh sketches are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from fedraclora.protocol.change_of_basis import held_beside
from fedraclora.protocol.instructions import Adapter, RoundInstructions
from fedraclora.tree import Tree

EXTRAS = PLAIN, LIFTED = "variates", "lifted_variates"
"""Names in `RoundInstructions.extras`: in the coordinates of what is trained, or as estimates."""


def is_lifted(sent: RoundInstructions) -> bool:
    """Check whether variates are kept as dense matrices of the weights."""
    return LIFTED in sent.extras


def variates_of(sent: RoundInstructions) -> Tree:
    """Return the variates added to gradients, by trained name: c, or c - c_k [K, ...]; none: {}."""
    return sent.extras.get(LIFTED if is_lifted(sent) else PLAIN, {})


def with_variates(sent: RoundInstructions, variates: Tree, *, lifted: bool) -> RoundInstructions:
    """Put variates into a downlink, replacing any that it has."""
    return replace(sent, extras=sent.extras | {LIFTED if lifted else PLAIN: variates})


def blank_variates(sent: RoundInstructions, dtype: torch.dtype) -> Tree:
    """Create zero variates for a new client, by the names under which they are stored.

    Args:
        sent: The downlink, which says what is trained and in which form variates are kept.
        dtype: Of the base weights.

    Returns:
        ``variates/<trained>`` in its shape; ``variates/<weight>`` [m, n] where they are dense.
    """
    found = {}
    for name, key, dense in _variates(sent):
        shape = sent.trained()[name].shape
        if dense is not None:
            beside = _beside(dense).shape
            shape = (shape[0], beside[1]) if name.endswith("/B") else (beside[0], shape[1])
        found[key] = torch.zeros(shape, dtype=dtype)
    return found


def seen(stored: Tree, sent: RoundInstructions) -> Tree:
    """Select the part of stored variates that this round's trained tensors see, by trained name.

    Args:
        stored: By the names of `blank_variates`, with or without a leading axis of clients.
        sent: Says what is trained.
    """
    found = {}
    for name, key, dense in _variates(sent):
        found[name] = C = stored[key]
        if dense is not None:
            beside = _beside(dense).to(C)
            found[name] = dense.scale * (C @ beside.mT if name.endswith("/B") else beside.mT @ C)
    return found


def moved_by(stored: Tree, sent: RoundInstructions, new: Tree, share: float = 1.0) -> Tree:
    """Move stored variates to a new estimate, on the part that the round sees.

    Args:
        stored: By the names of `blank_variates`, with or without a leading axis. Not modified.
        sent: Says what was trained.
        new: The values that `seen` returns after a full move, by trained name.
        share: Fraction of the move.

    Returns:
        A new tree, in the precision of ``stored``.
    """
    out, old = dict(stored), seen({n: t.double() for n, t in stored.items()}, sent)
    for name, key, dense in _variates(sent):
        step = share * (new[name].to(old[name]) - old[name])
        if dense is not None:
            # Directions that the factor hardly covers would amplify the rounding of the weights.
            inverse = torch.linalg.pinv(_beside(dense), rtol=1e-6).to(step) / dense.scale
            step = step @ inverse.mT if name.endswith("/B") else inverse.mT @ step
        out[key] = (stored[key].double() + step).to(stored[key])
    return out


def begin_variates(stored: Tree, sent: RoundInstructions) -> RoundInstructions:
    """Turn the variates of a downlink, c, into the corrections of clients: c - c_k, [K, ...].

    Args:
        stored: The clients' variates, [K, ...] by the names of `blank_variates`.
        sent: The received downlink.
    """
    own = seen(stored, sent)
    corrections = {n: c.cpu() - own[n] for n, c in variates_of(sent).items()}
    return with_variates(sent, corrections, lifted=is_lifted(sent))


def end_variates(stored: Tree, sent: RoundInstructions, directions: Tree) -> Tree:
    """Compute the variates that clients store after the round.

    Args:
        stored: Their variates before it, [K, ...]. Not modified.
        sent: Of `begin_variates`.
        directions: Of the mean local step, as the server sees it, by trained name, [K, ...]
            (`fedraclora.training.optimizer.mean_gradients`).
    """
    added = variates_of(sent)
    return moved_by(stored, sent, {n: g - added[n].cpu() for n, g in directions.items()})


def _variates(sent: RoundInstructions) -> Iterator[tuple[str, str, Adapter | None]]:
    """Yield each uploaded tensor, its variate's name, and the adapter if the variate is dense."""
    for name in sent.uploaded():
        weight = name.rpartition("/")[0]
        dense = sent.adapters.get(weight) if is_lifted(sent) else None
        yield name, f"variates/{name if dense is None else weight}", dense


def _beside(adapter: Adapter) -> torch.Tensor:
    pair = held_beside(adapter)
    if pair is None:
        raise ValueError(
            "control variates of whole weights need adapters with one trained factor and one that "
            "all clients share"
        )
    return pair[1]
