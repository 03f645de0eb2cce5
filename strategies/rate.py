"""The learning rate of a run that says ``local.lr=auto``: a rule for low-rank layers.

Under AdamW every number of a factor moves by about the rate, so that rank r, the scale s and rows
of A of length a move an output by about ``lr s a r`` in a step. The rate is therefore c / (s a r),
and less where layers are wide (as in muP) and where a round has many steps:

    AdamW:  c / (s a r w sqrt(h))      w: the smaller side of W, or 96;  h: steps of a round
    SGD:    c / (s a)^2                since W moves by lr s^2 a^2 times the projected gradient

c was fitted to tuned rates (docs/records/rates.md): of AdamW on pretrained transformers, of SGD on
images of digits alone. The rate is the median over layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median

import torch

from fedraclora.binding import PlainDict, section
from fedraclora.config.build import BuiltTask, plan_of
from fedraclora.config.builder import TaskBuilder
from fedraclora.config.run_config import RunConfig, from_plain
from fedraclora.errors import ConfigError
from fedraclora.object_registry import is_named
from fedraclora.protocol.method import Draw, RoundInstructions, first_instructions
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.wrappers import method_of
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import weights_of

# c, by optimizer and trained factors.
FITTED = {"adamw": {"B": 55.0, "A": 55.0, "BA": 27.5}, "sgd": {"B": 1.1, "A": 0.2, "BA": 0.1}}
NARROWEST = 96  # of the layers that c was fitted to: narrower ones would have huge rates
KNOWN = "the rule covers sgd and adamw without momentum, clipping or extras, on two factors a layer"


def resolved_rate(plain: Mapping[str, object], say: Callable[[str], object]) -> PlainDict:
    """Write the rate of the rule in the place of ``local.lr=auto``, and say it.

    Args:
        plain: The config of a new run.
        say: Is told the rate and what it follows from, where progress is shown.

    Raises:
        ConfigError: If the rule does not know such a run.
    """
    local = section(plain, "local")
    if local.get("lr") != "auto":
        return dict(plain)
    config = ruled(plain)
    rate, told = rate_for(config, TaskBuilder(config, pretrain=False).built)
    if config.output.progress:
        say(f"learning rate {rate:g}, by the rule for {told} (docs/local.md)")
    return {**plain, "local": {**local, "lr": rate}}


def ruled(plain: Mapping[str, object]) -> RunConfig:
    """Parse the config of a run whose rate the rule is to give.

    Raises:
        ConfigError: If the rule does not know its local steps.
    """
    local = section(plain, "local")
    own = local.get("train") is not None or is_named(local.get("name"))
    config = from_plain({**plain, "local": {**local, "lr": LocalConfig.lr}}, METHODS)
    if own or not is_known(config.local):
        raise ConfigError(f"local.lr=auto: {KNOWN}. Set local.lr=NUMBER")
    return config


def rate_for(config: RunConfig, built: BuiltTask) -> tuple[float, str]:
    """Compute the rate of the rule for a run of a task, and say what it follows from.

    Raises:
        ConfigError: If the rule does not know its method, or numbers are predicted under SGD.
    """
    # SGD's rates follow the scale of gradients, which that of a cross-entropy bounds.
    if config.local.optimizer == "sgd" and built.task.loss == "squared_error":
        raise ConfigError(
            "local.lr=auto: for SGD the rule covers classification, not squared_error. Set "
            "local.lr=NUMBER"
        )
    plan, draw, base = plan_of(config, built.task), Draw(config.seed), weights_of(built.task.model)
    method = method_of(config, built.task)
    downlink = first_instructions(
        method, method.initial_state(base, plan, draw), draw, built.cohort
    )
    steps = steps_of(config.local, built)
    rate = float(f"{rate_of(downlink, config.local.optimizer, steps):.2g}")
    drawings = (f.drawing for a in downlink.adapters.values() for f in a.factors.values())
    sketch = next((f"{d.kind} of " for d in drawings if d is not None), "")
    ranks = {f.shape[1] for a in downlink.adapters.values() for f in [*a.factors.values()][:1]}
    return rate, (
        f"{config.choices['method']}, {sketch}rank {', '.join(map(str, sorted(ranks)))}, under "
        f"{config.local.optimizer}, {steps:g} steps a round"
    )


def is_known(local: LocalConfig) -> bool:
    """Return whether the rule was fitted to such local steps."""
    plain = local.momentum == 0 and local.clip is None and not local.added
    return plain and local.optimizer in FITTED


def steps_of(local: LocalConfig, built: BuiltTask) -> float:
    """Count the local steps of a round, as the mean over clients."""
    if local.steps is not None:
        return local.steps
    sizes = built.task.train.sizes(torch.arange(built.clients)).double()
    batches = (sizes / (local.batch_size or sizes.clamp(min=1))).ceil()
    return round(local.epochs * float(batches.mean()), 1)


def rate_of(downlink: RoundInstructions, optimizer: str, steps: float) -> float:
    """Compute the rate of the rule.

    Args:
        downlink: Of the first round.
        optimizer: ``adamw`` or ``sgd``.
        steps: Of a client in a round.

    Raises:
        ConfigError: If layers have none, or more, than two factors.
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
    if not rates or len(rates) < len(downlink.adapters):
        raise ConfigError(f"local.lr=auto: {KNOWN}. Set local.lr=NUMBER")
    return median(rates)
