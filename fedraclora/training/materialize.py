"""From a downlink to the tensors that a chunk of clients trains with, and to dense weights."""

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
    """Make the tensors of a round for the clients in ``order``.

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
                    # A copy: views into a message lie anywhere, and products round by alignment.
                    value = value.clone()
                frozen[name] = value
            else:
                starts[name] = opening_of(factor, like.new_zeros(factor.shape), order)
                # A tall factor lies in memory as its transpose: so come its gradients
                # (`fedraclora.training.feedforward`); those of a dense weight do not.
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
    """Copy starts [1, ...] or [K, ...] to values [K, ...]."""
    return start.expand(K, *start.shape[1:]).clone(memory_format=torch.contiguous_format)


def opening_of(slot: Factor, default: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the start of a trained tensor as [1, ...] if shared, [K, ...] if per client."""
    opening = slot.opening()
    if opening is None:
        return default[None]
    start = opening.to(default.device, default.dtype)
    return start[order] if slot.per_client else start[None].clone()


def start_from(own: Tree, downlink: RoundInstructions) -> RoundInstructions:
    """Start the tensors that are named from each client's own, [K, ...]."""
    if not own:
        return downlink
    return downlink.mapped(
        lambda name, slot: replace(slot, numbers=own[name], sketch=None) if name in own else slot
    )


def factor_of(name: str, leaves: Tree, frozen: Tree, active: int) -> torch.Tensor:
    """Return a factor of the active clients, [active, ., .], or 2-D where they share it.

    Args:
        name: ``"<weight>/<label>"``.
        leaves: What is trained, [active, ...] by name.
        frozen: Factors that are not, 2-D or [K, ., .] by name.
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


def standing(downlink: RoundInstructions) -> RoundInstructions:
    """Keep of a downlink what its weights at the start are computed from, beside the base.

    A product with a factor that starts at zero adds nothing, and what starts from the base is there
    already; what stays at clients they have.
    """
    adapters = {
        name: adapter
        for name, adapter in downlink.adapters.items()
        if not any(f.blank and f.upload for f in adapter.factors.values())
    }
    whole = {n: f for n, f in downlink.dense.items() if not (f.blank and f.upload)}
    kept = replace(downlink, adapters=adapters, dense=whole, ranks=None, extras={})
    return replace(kept, program=kept.program.at_rest())


def standing_weights(base: Tree, downlink: RoundInstructions, plan: Plan, own: Tree) -> Tree:
    """Compute the weights of one client, to the bit as a server does that has the same factors.

    Args:
        base: The replica's weights.
        downlink: What it was asked to train, without values of other clients.
        plan: Views of the adapted matrices.
        own: Values of its own in the place of those from which it starts, by name.

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
