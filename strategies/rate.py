"""A rule for the learning rate of low-rank layers, from which the search for a rate starts.

Under AdamW every number of a factor changes by about the learning rate. With rank r, scale s and
rows of A of length a, a step changes an output by about ``lr s a r``. The rate is therefore
c / (s a r), and smaller for wide layers (as in muP) and for rounds with many steps:

    AdamW:  c / (s a r w sqrt(h))      w: the smaller side of W, or 96;  h: steps of a round
    SGD:    c / (s a)^2                since W moves by lr s^2 a^2 times the projected gradient

c was fitted to tuned rates (docs/records/rates.md): for AdamW on pretrained transformers, for SGD
only on images of digits. The rate is the median over layers. Whole weights that AdamW trains need a
smaller rate than factors, the smaller the more inputs n a layer has, as in muP (Yang et al., arXiv
2203.03466): `DENSE` / n, with the median n.

Where no rule knows the run, `first_rate` is where the search begins.
"""

from __future__ import annotations

import math
from statistics import median

import torch
from torch import nn

from fedraclora.config.build import PreparedTask, plan_of
from fedraclora.config.run_config import RunConfig
from fedraclora.protocol.method import Draw, RoundInstructions, first_instructions
from fedraclora.strategies.wrappers import method_of
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import weights_of

# c, by optimizer and trained factors.
FITTED = {"adamw": {"B": 55.0, "A": 55.0, "BA": 27.5}, "sgd": {"B": 1.1, "A": 0.2, "BA": 0.1}}
FIRST_RATES = {"sgd": 0.1, "own": 1.0}  # of the user's own function the rate is a factor
FIRST_ADAPTIVE = 0.003  # of optimizers whose steps have about the length of the rate
DENSE = 0.1  # whole weights: 0.00026 for layers of 384 inputs
NARROWEST = 96  # of the layers that c was fitted to: narrower ones would have huge rates


def rule_rate(config: RunConfig, built: PreparedTask) -> float | None:
    """Compute the rate of the rule for a run of a task; None if the rule does not cover it."""
    local = config.local
    # SGD's rates follow the scale of gradients, which that of a cross-entropy bounds.
    unbounded = local.optimizer == "sgd" and built.task.loss == "squared_error"
    if local.is_own or not is_known(local) or unbounded:
        return None
    downlink = first_downlink(config, built)
    if not downlink.adapters and downlink.program.plain and local.optimizer == "adamw":
        return dense_rate(built.task.model)
    rate = rate_of(downlink, local.optimizer, steps_of(local, built))
    return None if rate is None else float(f"{rate:.2g}")


def first_rate(config: RunConfig, built: PreparedTask) -> float:
    """Return the rate from which a search begins where no rule knows the run."""
    kind = "own" if config.local.is_own else config.local.optimizer
    if kind in FIRST_RATES:
        return FIRST_RATES[kind]
    if first_downlink(config, built).adapters:
        return FIRST_ADAPTIVE
    return dense_rate(built.task.model)


def dense_rate(model: nn.Module) -> float:
    """Return the rate of AdamW for whole weights, which falls with the inputs of a layer."""
    inputs = [w[0].numel() for w in weights_of(model).values() if w.dim() > 1]
    return float(f"{DENSE / median(inputs):.2g}") if inputs else FIRST_ADAPTIVE


def first_downlink(config: RunConfig, built: PreparedTask) -> RoundInstructions:
    """Return what the method of a run sends to clients in the first round."""
    plan, draw, base = plan_of(config, built.task), Draw(config.seed), weights_of(built.task.model)
    method = method_of(config, built.task)
    return first_instructions(method, method.initial_state(base, plan, draw), draw, built.cohort)


def is_known(local: LocalConfig) -> bool:
    """Return whether the rule was fitted to such local steps."""
    plain = local.momentum == 0 and local.clip is None and not local.added
    return plain and local.optimizer in FITTED


def steps_of(local: LocalConfig, built: PreparedTask) -> float:
    """Count the local steps of a round, as the mean over clients."""
    if local.steps is not None:
        return local.steps
    sizes = built.task.train.sizes(torch.arange(built.clients)).double()
    batches = (sizes / (local.batch_size or sizes.clamp(min=1))).ceil()
    return round(local.epochs * float(batches.mean()), 1)


def rate_of(downlink: RoundInstructions, optimizer: str, steps: float) -> float | None:
    """Compute the rate of the rule; None if layers do not have two factors.

    Args:
        downlink: Of the first round.
        optimizer: ``adamw`` or ``sgd``.
        steps: Local steps of a client in a round.
    """
    rates = []
    for adapter in downlink.adapters.values():
        factors = [*adapter.factors.values()]
        trained = "".join(label for label, f in adapter.factors.items() if f.trained)
        if len(factors) != 2 or trained not in FITTED[optimizer]:
            break
        rank = factors[0].shape[1]
        width = max(NARROWEST, min(factors[0].shape[0], factors[1].shape[1]))
        length = math.prod(spec.gram_scale for f in factors if (spec := f.drawing)) ** 0.5
        scale, rate = adapter.scale * length, FITTED[optimizer][trained]
        wide = rank * width * math.sqrt(steps)
        rates.append(rate / (scale * wide) if optimizer == "adamw" else rate / scale**2)
    return median(rates) if rates and len(rates) == len(downlink.adapters) else None
