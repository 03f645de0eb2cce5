"""The step that local SGD takes in weight space, for the ledger."""

from __future__ import annotations

from math import prod

from fedraclora.protocol.method import Downlink
from fedraclora.sketch import SketchSpec
from fedraclora.training.localconfig import LocalConfig


def effective_step(downlink: Downlink, local: LocalConfig, rate_scale: float) -> dict[str, float]:
    """Give the step gamma inside the sketch, W <- W - gamma G H, over all sketched layers.

    gamma = lr s^2 c where A A^T is about c I (with two frozen factors the product of their c); with
    a preconditioner c drops out, and under LoRA-Pro s^2 does, too. It compares sketches, ranks and
    scales where the raw learning rate does not. It is the step of a gradient: momentum is not in
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
    inverts = local.precondition or local.adjust != "none"
    gammas = []
    for adapter in downlink.adapters.values():
        specs = [f for f in adapter.factors.values() if isinstance(f, SketchSpec)]
        if specs:
            gram = 1.0 if inverts else prod(spec.gram_scale for spec in specs)
            scale = 1.0 if local.adjust == "lora_pro" else adapter.scale
            gammas.append(rate * scale**2 * gram)
    if not gammas:
        return {"lr": rate}
    return {"lr": rate, "gamma_min": min(gammas), "gamma_max": max(gammas)}
