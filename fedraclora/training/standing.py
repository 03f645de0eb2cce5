"""The dense weights that a client has at the start of a downlink, as the server computes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedraclora.narrow_weight import dense
from fedraclora.protocol.link import Link, Plan, Term, apply_link
from fedraclora.protocol.method import Downlink
from fedraclora.protocol.pool import fold_pools
from fedraclora.training.extra import Scaling
from fedraclora.training.materialise import start_from
from fedraclora.tree import Tree, widened


def standing(downlink: Downlink) -> Downlink:
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
    return replace(kept, recipe="plain", arguments={}, turn=None)


def standing_weights(
    base: Tree, downlink: Downlink, plan: Plan, own: Tree, scalings: Iterable[Scaling] = ()
) -> Tree:
    """Compute the weights of one client, to the bit as a server does that has the same factors.

    Args:
        base: The replica's weights.
        downlink: What it was asked to train, without values of other clients.
        plan: Views of the adapted matrices.
        own: Values of its own in the place of those from which it starts, by name.
        scalings: What may scale rows.

    Returns:
        Every parameter by name, in stored layout. Products are formed in float64, and rounded once.
    """
    asked = start_from(own, downlink)
    base, narrow = fold_pools(base, asked.pools, plan)
    terms = {
        name: Term(tuple(adapter.factors.values()), adapter.scale)
        for name, adapter in asked.adapters.items()
        if not any(factor.blank for factor in adapter.factors.values())
    }
    wide = widened(base | dense({name: base[name] for name in asked.adapters}))
    out = apply_link(apply_link(wide, Link(narrow), plan), Link(terms), plan)
    whole = {n: start for n, slot in asked.dense.items() if (start := slot.opening()) is not None}
    for scaling in scalings:
        for weight, view in plan.targets.items():
            if (lengths := whole.pop(scaling.name_of(weight), None)) is not None:
                known = out[weight]
                rows = scaling.rows(lengths.to(known).double(), view.matrix(known).double())
                out[weight] = view.stored(rows.to(known.dtype), known)
    return out | {name: value.to(out[name]) for name, value in whole.items() if name in out}
