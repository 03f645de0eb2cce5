"""The step that local SGD takes in weight space, for the ledger."""

from __future__ import annotations

from math import prod

from fedraclora.protocol.method import Downlink
from fedraclora.sketch import SketchSpec
from fedraclora.training.localconfig import LocalConfig


def effective_step(downlink: Downlink, local: LocalConfig, rate_scale: float) -> dict[str, float]:
    """Compute the step gamma inside the sketch, W <- W - gamma G H, over all sketched layers.

    gamma = lr s^2 c where A A^T is about c I (with two frozen factors the product of their c), but
    where an extra of local training says otherwise. It compares sketches, ranks and scales where
    the raw learning rate does not. It is the step of a gradient: momentum is not in
    it, and the steps of adaptive optimisers have no such factor.

    Args:
        downlink: The round's.
        local: Gives the step size of the trained factor.
        rate_scale: Of the step sizes in this round.

    Returns:
        ``lr`` (of the trained factor), and under SGD the least and largest gamma where layers are
        sketched.
    """
    rate = local.rate(main=True, rate_scale=rate_scale)
    if local.optimiser != "sgd":
        return {"lr": rate}
    gammas = []
    for adapter in downlink.adapters.values():
        specs = [f for f in adapter.factors.values() if isinstance(f, SketchSpec)]
        if specs:
            scale, gram = adapter.scale, prod(spec.gram_scale for spec in specs)
            for extra in local.extras:
                scale, gram = extra.step_in_weights(scale, gram)
            gammas.append(rate * scale**2 * gram)
    if not gammas:
        return {"lr": rate}
    return {"lr": rate, "gamma_min": min(gammas), "gamma_max": max(gammas)}
