"""Keep the moments of a client's optimizer at the client from round to round.

Several rounds may pass before a merge, so that progress can be measured or stopped in between. The
local steps equal those of one long round if the moments (and Adam's step count) are kept:

    local.optimizer_state = round   reset to zero in every round
    local.optimizer_state = merge   reset at each merge
    local.optimizer_state = run     never reset, though a merge ends their sketch
    local.optimizer_state = rows    reset in every round, but the server averages second
                                    moments of rows (`fedraclora.training.optimizer`)

``merge`` gives each link an optimizer of its own. Under ``run``, as in public code of such methods,
the optimizer does not know of the merge. ``local.optimizer_state_kept``
lets a share of the moments outlive a link: for each tensor the entries whose first moment is
largest, the others are set to zero. That is the partial reset of ReLoRA (Lialin et al., ICLR 2024,
arXiv 2307.05695), which keeps 1 % or less; like its public code it leaves the count of steps as it
is. That code prunes the second moment by its own magnitude. Here both keep the same entries: where
a first moment stays and its second is gone, Adam divides by eps, and A of a new link, whose
gradient is zero while B is, moves by 1e8 times the step size unless the warm-up begins at a rate
of zero.

Moments are not sent: each client has its own, also for averaged tensors. Averaging is therefore not
exact, and a rarely sampled client has old moments; with one client there is no difference.
Shuffles and dropout masks are keyed by the round, so K rounds of one epoch see other batches than
one round of K epochs; in the stored order (``local.shuffle=false``) they see the same ones.
"""

from __future__ import annotations

import torch

from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.training.localconfig import LocalConfig, moment_kinds
from fedraclora.tree import Tree


def moment_shapes(local: LocalConfig, downlink: RoundInstructions) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an optimizer's state for one client.

    Args:
        local: Settings.
        downlink: Says what is trained.

    Returns:
        By ``first/<name>`` and so on: as what is trained, unless the method's program says
        otherwise (`ClientProgram.moment_shapes`).
    """
    return downlink.program.moment_shapes(downlink, moment_kinds(local))


def blank_moments(local: LocalConfig, downlink: RoundInstructions, dtype: torch.dtype) -> Tree:
    """Create zero moments of a client that has not trained yet, to be stored by name.

    Args:
        local: Settings; under ``optimizer_state=round`` and ``rows`` clients keep nothing.
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
    """Compute the moments with which clients begin a round; reset them if their link has ended.

    Args:
        stored: The clients' moments, [K, ...] by the names of `blank_moments`. Not modified.
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
    """Mark the largest entries of each client by magnitude.

    Args:
        values: [K, ...].
        share: Fraction of each client's entries to mark, rounded to a number of entries.

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
