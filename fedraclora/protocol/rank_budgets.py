"""Apply rank budgets: a client trains only the first components of every adapter; sums stay exact.

    client k trains the first r_k columns of B under the first r_k rows of the shared A;
    W <- W + s (sum_k p_k B_k) A, where columns j > r_k of B_k keep their starting values

The sketch and the scale ``s`` are common, so ``sum_k p_k (W + s B_k A)`` equals this merge, the
zero-padded sum. Only clients with ``r_k >= j`` contribute to row j of A.

Values beyond a budget keep their starting value and are not sent. That value is zero under a fresh
sketch. If a sketch is kept for several rounds, it is the continued value, which the client uses as
part of its frozen weights: without it, every round with a small client would shrink the components
that large clients have trained.

Several sketches in a round work in the same way: the rows of one drawing are cut into G parts, and
client k trains part g_k. The sum is exact for the same reason.

References:
    Cho et al., *Heterogeneous LoRA for federated fine-tuning*, arXiv 2401.06432, truncate and pad
    factors that are both trained, which is not exact; one shared sketch makes it so.
"""

from __future__ import annotations

from math import prod

import torch

from fedraclora.errors import ConfigError, ShapeError, WireError
from fedraclora.protocol.method import Adapter, Cohort, RoundInstructions
from fedraclora.tree import Tree


def check_budgets(downlink: RoundInstructions, cohort: Cohort) -> None:
    """Check that an exchange has one rank budget for each client.

    Raises:
        ConfigError: If the method does not pass on the clients' budgets.
        ShapeError: If the budgets are not one for each client.
    """
    if cohort.ranks is not None and downlink.ranks is None:
        raise ConfigError(
            "clients have rank budgets, but the method did not hand them on: set "
            "RoundInstructions.ranks from Cohort.ranks, or run without budgets"
        )
    if downlink.ranks is not None and len(downlink.ranks) != len(cohort):
        raise ShapeError(
            f"a downlink to {len(cohort)} clients has rank budgets of shape "
            f"{tuple(downlink.ranks.shape)}, expected one for each (a later exchange of a round "
            "asks only those that are left)"
        )


def rank_axes(adapter: Adapter, label: str) -> tuple[int, ...]:
    """Return the axes of a factor that count components.

    Example:
        >>> from fedraclora.protocol.factor import to_train
        >>> chain = Adapter({"B": to_train((5, 2)), "A": to_train((2, 7))}, scale=1.0)
        >>> rank_axes(chain, "B"), rank_axes(chain, "A")
        ((1,), (0,))
    """
    labels = list(adapter.factors)
    return tuple(axis for axis, end in ((0, labels[0]), (1, labels[-1])) if label != end)


def spans(ranks: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first component of each client and the one after its last.

    Args:
        ranks: Budgets, int64 [K]: the first r_k; or parts, int64 [K, 2]: part g of G.
        size: Components in all.

    Returns:
        Two tensors int64 [K], at most ``size``.

    Example:
        >>> [end.tolist() for end in spans(torch.tensor([[0, 2], [1, 2]]), 6)]
        [[0, 3], [3, 6]]
    """
    if ranks.dim() == 1:
        return torch.zeros_like(ranks), ranks.clamp(max=size)
    part, parts = ranks.unbind(dim=1)
    return part * size // parts, (part + 1) * size // parts


def within(ranks: torch.Tensor, size: int) -> torch.Tensor:
    """Return a mask of each client's components: bool [K, size]; ranks as in `spans`."""
    first, end = spans(ranks, size)
    places = torch.arange(size, device=ranks.device)
    return (places >= first[:, None]) & (places < end[:, None])


def trainable(downlink: RoundInstructions, ranks: torch.Tensor | None) -> Tree:
    """Return masks of the entries that clients train, for factors that a budget limits.

    Args:
        downlink: The instructions.
        ranks: Ranks of the clients, as in `spans`, or None.

    Returns:
        Masks by trained name, bool, [K, rows, cols] with 1 for an axis that is not cut. Factors
        that every client trains as a whole are left out, at no cost.
    """
    masks: Tree = {}
    if ranks is None:
        return masks
    for weight, adapter in downlink.adapters.items():
        for label, factor in adapter.factors.items():
            if not factor.trained:
                continue
            mask = torch.ones(len(ranks), 1, 1, dtype=torch.bool, device=ranks.device)
            for axis in rank_axes(adapter, label):
                budget = within(ranks, factor.shape[axis])
                mask = mask & (budget[:, :, None] if axis == 0 else budget[:, None, :])
            if not mask.all():
                masks[f"{weight}/{label}"] = mask
    return masks


def hold(values: Tree, starts: Tree, masks: Tree, active: int) -> None:
    """Restore, in place, values beyond a budget, which weight decay changes without a gradient.

    Args:
        values: Trained tensors, [K, ...]; the first ``active`` clients have taken a step.
        starts: Where they started, [1, ...] or [K, ...].
        masks: The result of `trainable`.
        active: Clients that still train.
    """
    for name, mask in masks.items():
        now = values[name][:active]
        now.copy_(torch.where(mask[:active], now, starts[name][:active]))


def cut_gradients(gradients: Tree, masks: Tree) -> Tree:
    """Set gradients beyond a budget to zero, NaN too; the order of names is kept."""
    return {
        name: gradient.masked_fill(~masks[name][: gradient.shape[0]], 0)
        if name in masks
        else gradient
        for name, gradient in gradients.items()
    }


def uploaded_mask(downlink: RoundInstructions, places: torch.Tensor) -> torch.Tensor | None:
    """Return a mask of the numbers that each client sends of its row.

    Args:
        downlink: The instructions.
        places: The clients' positions among those of the downlink, int64 [k].

    Returns:
        bool [k, P] over the uplink's packing order, or None without budgets.
    """
    if downlink.ranks is None:
        return None
    masks = trainable(downlink, downlink.ranks[places])
    whole = torch.ones(1, dtype=torch.bool)
    parts = [
        masks.get(name, whole)
        .expand(len(places), *slot.shape)
        .reshape(len(places), prod(slot.shape))
        for name, slot in downlink.uploaded().items()
    ]
    return torch.cat(parts, dim=1) if parts else torch.zeros(len(places), 0, dtype=torch.bool)


def widen(numbers: torch.Tensor, downlink: RoundInstructions, places: torch.Tensor) -> torch.Tensor:
    """Expand the clients' numbers under budgets to full rows; the rest keeps its starting value.

    Args:
        numbers: Their numbers, one client after another, [total].
        downlink: The instructions. Without budgets ``numbers`` are rows, and returned unchanged.
        places: The clients' positions in the round, int64 [k].

    Returns:
        [k, P] in the uplink's packing order.

    Raises:
        WireError: If the number of values does not match the budgets.
    """
    mask = uploaded_mask(downlink, places)
    if mask is None:
        return numbers
    if tuple(numbers.shape) != (int(mask.sum()),):
        raise WireError(
            f"{len(places)} clients sent numbers of shape {tuple(numbers.shape)}, "
            f"expected {(int(mask.sum()),)} under the rank budgets {downlink.ranks}"
        )
    rows = numbers.new_zeros(mask.shape)
    at = 0
    for slot in downlink.uploaded().values():
        size = prod(slot.shape)
        if (start := slot.opening()) is not None:
            start = start[places] if slot.per_client else start[None]
            rows[:, at : at + size] = start.reshape(-1, size).to(rows)
        at += size
    rows[mask] = numbers
    return rows


def uploaded_numbers(downlink: RoundInstructions, cohort: int) -> torch.Tensor:
    """Return how many numbers each client of a round sends back, int64 [K]."""
    total = torch.zeros(cohort, dtype=torch.int64)
    masks = trainable(downlink, downlink.ranks)
    for name, slot in downlink.uploaded().items():
        if name in masks:
            mask = masks[name]
            total += mask.sum(dim=(1, 2)) * prod(slot.shape) // prod(mask.shape[1:])
        else:
            total += prod(slot.shape)
    return total
