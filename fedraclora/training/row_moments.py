"""Second moments of rows that outlive sketches (``local.moments=rows``): averaged at the server.

Under a right sketch B has the gradient g = s G A^T, with G that of the weight. Where the rows a_j
of A are uniform on the sphere, E[a_j a_j^T] = I / n, so that whatever the draw

    E[g_ij^2] = s^2 ||G_i||^2 / n                (left sketches: s^2 ||column j of G||^2 / m)

An entry of B means another thing under each sketch, but the second moments of its rows go on. m of
them stand for the m r of AdamW:

    client k:  v_k <- v in all entries of a row, then AdamW's steps;  sends the mean over each row
    server:    v <- sum_k p_k v_k,   w <- sum_k p_k w_k

The first moment, which has the sketch's coordinates, begins at zero in each round. w is the moving
average of the constant 1, ``w <- beta2 w + 1 - beta2`` at each step of v: what v has to be divided
by so that its mean is that of the squares, v / w. It takes the place of ``1 - beta2^t`` in AdamW's
correction and is equal to it for one client. Since it is averaged with v, squares count alike
whichever round they are of and however many steps a client takes, until 1 / (1 - beta2) steps have
been seen; after a start without correction the first round's would count more for as long.

Tensors that are trained in full begin each round without moments. Uplink: m + 1 numbers per factor
more, downlink likewise from the second round on.

References:
    Start and average of second moments by blocks: *FedAdamW*, arXiv 2510.27486 (its abstract).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedraclora.protocol.downlink import Downlink
from fedraclora.protocol.factor import Factor, to_train
from fedraclora.tree import Tree

ROW_SLOT = "rows/"  # of the names of slots and moments; the rest is the name of the factor


def row_slots(sent: Downlink, kept: Tree) -> dict[str, Factor]:
    """Build the slots in which the moments of trained factors travel, m + 1 numbers for B.

    Args:
        sent: What the method asks.
        kept: Moments so far, by the names of the slots; they begin at zero.
    """
    found = {}
    for name, slot in sent.factors().items():
        if slot.trained and slot.upload and name.endswith(("/A", "/B")):
            rows = slot.shape[_axis(name) ^ 1]
            found[ROW_SLOT + name] = to_train((rows + 1,), kept.get(ROW_SLOT + name), main=False)
    return found


def taken_rows(sent: Downlink) -> tuple[Downlink, Tree]:
    """Take the slots of `row_slots` out of a downlink, for what is trained by gradients.

    Returns:
        The rest, and moments by the names of factors.
    """
    slots = {n: slot for n, slot in sent.dense.items() if n.startswith(ROW_SLOT)}
    if not slots:
        return sent, {}
    dense = {n: slot for n, slot in sent.dense.items() if n not in slots}
    rows = {}
    for name, slot in slots.items():
        start = slot.opening()
        rows[name.removeprefix(ROW_SLOT)] = torch.zeros(slot.shape) if start is None else start
    return replace(sent, dense=dense), rows


def row_entries(name: str, rows: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Compute the second moments with which clients begin, [K, ...] as ``like``, and 1 - w."""
    v = rows[:-1].to(like).unsqueeze(_axis(name))
    return v.expand_as(like).clone(), 1 - float(rows[-1])


def of_rows(name: str, second: torch.Tensor, unseen: torch.Tensor) -> torch.Tensor:
    """Compute what clients send of second moments [K, ...], [K, m + 1]; ``unseen`` are 1 - w."""
    v = second.mean(dim=_axis(name) + 1)
    return torch.cat([v, (1 - unseen).to(v)[:, None]], dim=1)


def _axis(name: str) -> int:
    """Give the axis of a factor's components: the second one of B, the first one of A."""
    return 1 if name.endswith("/B") else 0
