"""Moments of a client's optimizer that live on from round to round, at the client.

A link may be several rounds long, so that it can be measured, or stopped, on its way. Its local
steps are those of one long round if the moments (and Adam's count of steps) live on:

    local.optimizer_state = round   they begin at zero in every round
    local.optimizer_state = merge   they live until the merge: a new link begins with new ones
    local.optimizer_state = run     they are never reset, though a merge ends their sketch
    local.optimizer_state = rows    they begin anew in every round, but the server averages second
                                    moments of rows (`fedraclora.training.optimizer`)

``merge`` is a chain whose links have an optimizer of their own. Under ``run``, as in public code of
chains, the optimizer does not know of the merge. ``local.optimizer_state_kept``
lets a share of the moments outlive a link: for each tensor the entries whose first moment is
largest, the others are set to zero. That is the partial reset of ReLoRA (Lialin et al., ICLR 2024,
arXiv 2307.05695), which keeps 1 % or less; like its public code it leaves the count of steps as it
is. That code prunes the second moment by its own magnitude. Here both keep the same entries: where
a first moment stays and its second is gone, Adam divides by eps, and A of a new link, whose
gradient is zero while B is, moves by 1e8 times the step size unless the warm-up begins at a rate
of zero.

Moments do not travel: each client has its own, also of what is averaged. They are not exact under
averaging, and one that is seldom asked has old ones; with one client there is no difference.
Shuffles and dropout masks are keyed by the round, so K rounds of one epoch see other batches than
one round of K epochs; in the stored order (``local.shuffle=false``) they see the same ones.

"""

from __future__ import annotations

import torch

from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.training.localconfig import LocalConfig, moment_kinds
from fedraclora.tree import Tree


def moment_shapes(local: LocalConfig, downlink: RoundInstructions) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what an optimizer holds for one client.

    Args:
        local: Settings.
        downlink: Says what is trained.

    Returns:
        By ``first/<name>`` and so on: as what is trained, unless the method's program says
        otherwise (`ClientProgram.moment_shapes`).
    """
    return downlink.program.moment_shapes(downlink, moment_kinds(local))


def blank_moments(local: LocalConfig, downlink: RoundInstructions, dtype: torch.dtype) -> Tree:
    """Build the moments of a client that has not trained yet, to be stored by name.

    Args:
        local: Settings; nothing stays at clients under ``moments: round`` and ``rows``.
        downlink: Says what is trained.
        dtype: Of the base weights.

    Returns:
        ``moments/first/<name>`` and so on in the shapes of `moment_shapes`, ``moments/steps``
        (steps that they have seen) and ``moments/link`` (the link that they belong to), without
        a client axis.
    """
    if local.optimizer_state in {"round", "rows"}:
        return {}
    shapes = moment_shapes(local, downlink)
    found = {f"moments/{name}": torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    return found | {key: torch.zeros((), dtype=dtype) for key in ("moments/steps", "moments/link")}


def begin_moments(stored: Tree, local: LocalConfig, link: int) -> Tree:
    """Compute the moments with which clients begin a round: reset where their link has ended.

    Args:
        stored: What they kept, [K, ...] by the names of `blank_moments`. Not modified.
        local: Settings.
        link: Number of the link that the round belongs to.

    Returns:
        A new tree.
    """
    if not stored:
        return {}
    ended = stored["moments/link"] != link
    out = {**stored, "moments/link": torch.full_like(stored["moments/link"], link)}
    if local.optimizer_state == "run" or not ended.any():
        return out
    for name, value in stored.items():
        if name == "moments/link":
            continue
        if name == "moments/steps":
            left = value if local.optimizer_state_kept else torch.zeros_like(value)
        else:
            first = stored[name.replace("moments/second/", "moments/first/")]
            left = value.where(mark_largest(first, local.optimizer_state_kept), 0)
        out[name] = torch.where(ended.reshape(-1, *[1] * (value.dim() - 1)), left, value)
    return out


def mark_largest(values: torch.Tensor, share: float) -> torch.Tensor:
    """Mark the entries of largest magnitude of each client.

    Args:
        values: [K, ...].
        share: Of each client's entries that is marked, rounded to a number of entries.

    Returns:
        Booleans [K, ...].

    Example:
        >>> mark_largest(torch.tensor([[3.0, -4.0, 1.0, 0.0]]), 0.5)
        tensor([[ True,  True, False, False]])
    """
    rows = values.reshape(len(values), -1)
    order = rows.abs().argsort(dim=1, descending=True, stable=True)
    first = order[:, : round(share * rows.shape[1])]
    return (
        torch.zeros_like(rows, dtype=torch.bool).scatter(1, first, value=True).reshape(values.shape)
    )
