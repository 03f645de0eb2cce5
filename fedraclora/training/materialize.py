"""Build the trained tensors of a chunk, and dense weights, from a round's downlink."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedraclora.lowrank.dora import magnitudes, rescaled
from fedraclora.narrow_weight import dense
from fedraclora.protocol.link import Link, Plan, Term, apply_link
from fedraclora.protocol.method import Factor, RoundInstructions
from fedraclora.tree import Tree, wide, widened


def materialize(
    downlink: RoundInstructions, base: Tree, order: torch.Tensor
) -> tuple[Tree, Tree, Tree]:
    """Create the trained values, their starts and the frozen factors for the clients in ``order``.

    Returns:
        Trained values [K, ...], their starts (shared ones as [1, ...]), and the frozen factors
        by "<weight>/<label>" (shared ones 2-D).
    """
    K = len(order)
    values, starts, frozen = {}, {}, {}
    for weight, adapter in downlink.adapters.items():
        like = torch.empty(0, dtype=wide(base[weight].dtype), device=base[weight].device)
        for label, factor in adapter.factors.items():
            name = f"{weight}/{label}"
            if not factor.trained:
                value = factor.draw().to(like.device, like.dtype)
                if factor.per_client:
                    value = value[order]
                elif factor.numbers is not None:
                    # A copy: views into a message have any alignment, and products round by
                    # alignment.
                    value = value.clone()
                frozen[name] = value
            else:
                starts[name] = opening_of(factor, like.new_zeros(factor.shape), order)
                # A tall factor is stored transposed, as its gradients are
                # (`fedraclora.training.feedforward`); a dense weight is not.
                tall = factor.shape[0] > factor.shape[1]
                start = starts[name].mT if tall else starts[name]
                values[name] = per_client(start, K).mT if tall else per_client(start, K)
    like = next(iter(base.values()))
    for name, slot in downlink.dense.items():
        # A magnitude is no parameter of the base.
        default = base[name] if name in base else torch.zeros(slot.shape).to(like)
        starts[name] = opening_of(slot, default, order)
        values[name] = per_client(starts[name], K)
    return values, starts, frozen


def per_client(start: torch.Tensor, K: int) -> torch.Tensor:
    """Expand starts [1, ...] or [K, ...] to one copy per client, [K, ...]."""
    return start.expand(K, *start.shape[1:]).clone(memory_format=torch.contiguous_format)


def opening_of(slot: Factor, default: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the start of a trained tensor as [1, ...] if shared, [K, ...] if per client."""
    opening = slot.opening()
    if opening is None:
        return default[None]
    start = opening.to(default.device, default.dtype)
    return start[order] if slot.per_client else start[None].clone()


def start_from(own: Tree, downlink: RoundInstructions) -> RoundInstructions:
    """Replace the starts of the named tensors by each client's own values, [K, ...]."""
    if not own:
        return downlink
    return downlink.mapped(
        lambda name, slot: replace(slot, numbers=own[name], sketch=None) if name in own else slot
    )


def factor_of(name: str, leaves: Tree, frozen: Tree, active: int) -> torch.Tensor:
    """Return a factor of the active clients, [active, ., .], or 2-D if they share it.

    Args:
        name: ``"<weight>/<label>"``.
        leaves: What is trained, [active, ...] by name.
        frozen: Frozen factors, 2-D or [K, ., .] by name.
        active: Clients that still train: the first ones.
    """
    if name in leaves:
        return leaves[name]
    return frozen[name][:active] if frozen[name].dim() == 3 else frozen[name]


def arrange(
    downlink: RoundInstructions, leaves: Tree, frozen: Tree, active: int
) -> tuple[dict[str, list[torch.Tensor]], Tree]:
    """Sort tensors into low-rank terms and dense ones, cut to the active clients."""
    factors = {
        weight: [factor_of(f"{weight}/{k}", leaves, frozen, active) for k in adapter.factors]
        for weight, adapter in downlink.adapters.items()
    }
    return factors, {n: leaves[n] for n in downlink.dense}


def for_measuring(downlink: RoundInstructions) -> RoundInstructions:
    """Reduce a downlink to the parts that, with the base, determine its initial weights.

    A product with a factor that starts at zero adds nothing; tensors that start from the base are
    already there; personal tensors are at their clients.
    """
    adapters = {
        name: adapter
        for name, adapter in downlink.adapters.items()
        if not any(f.blank and f.upload for f in adapter.factors.values())
    }
    whole = {n: f for n, f in downlink.dense.items() if not (f.blank and f.upload)}
    kept = replace(downlink, adapters=adapters, dense=whole, ranks=None, extras={})
    return replace(kept, program=kept.program.initial_part())


def current_weights(base: Tree, downlink: RoundInstructions, plan: Plan, own: Tree) -> Tree:
    """Compute one client's weights, bit for bit as the server does from the same factors.

    Args:
        base: The replica's weights.
        downlink: What it was asked to train, without values of other clients.
        plan: Views of the adapted matrices.
        own: The client's own values, by name, which replace its starting values.

    Returns:
        Every parameter by name, in stored layout. Products are formed in float64, and rounded once.
    """
    asked = start_from(own, downlink)
    base, narrow = asked.program.fold(base, plan)
    terms = {
        name: Term(tuple(adapter.factors.values()), adapter.scale)
        for name, adapter in asked.adapters.items()
        if not any(factor.blank for factor in adapter.factors.values())
    }
    wide = widened(base | dense({name: base[name] for name in asked.adapters}))
    out = apply_link(apply_link(wide, Link(narrow), plan), Link(terms), plan)
    whole = {n: start for n, slot in asked.dense.items() if (start := slot.opening()) is not None}
    for weight, name in magnitudes(plan.targets, whole).items():
        known, view = out[weight], plan.targets[weight]
        rows = rescaled(view.matrix(known).double(), whole.pop(name).to(known).double())
        out[weight] = view.stored(rows.to(known.dtype), known)
    return out | {name: value.to(out[name]) for name, value in whole.items() if name in out}
