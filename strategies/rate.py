"""A rule for the learning rate of low-rank layers, from which the search for a rate starts.

Under AdamW every number of a factor changes by about the learning rate. With rank r, scale s and
rows of A of length a, a step changes an output by about ``lr s a r``. The rate is therefore
c / (s a r), and smaller for wide layers (as in muP) and for rounds with many steps:

    AdamW:  c / (s a r w sqrt(h))      w: the smaller side of W, or 96;  h: steps of a round
    SGD:    c / (s a)^2                since W moves by lr s^2 a^2 times the projected gradient

c was fitted to tuned rates (docs/records/rates.md): for AdamW on pretrained transformers, for SGD
only on images of digits. The rate is the median over layers. Where both factors are trained from
given numbers, a is the mean of the lengths of A's rows and B's columns. In s B R A, where R [r, r]
alone is trained, a is the product of both. A step of R reaches the m outputs through B, and so
sqrt(r / m) as far as one of B: AdamW's rate is larger by the inverse, and c is that of B.

A method that trains B and A by turns has the rate of one that trains both, if each stays as it is
in the other's turn. If the other factor is drawn instead, a round is one of a single factor, and
the rate is `DRAWN_TURNS` times the lowest of these.

The changes of layers add up in the output of a deep model. Where AdamW adapts more layers than
`DEEPEST`, as many as in the deepest model that c was fitted to, the rate falls with the square root
of their number, as in depth-muP (Yang et al., arXiv 2310.02244).

Whole weights that AdamW trains need a smaller rate than factors, the smaller the more inputs n a
layer has, as in muP (Yang et al., arXiv 2203.03466): `DENSE` / n, with the median n.

Where no rule knows the run, `first_rate` is where the search begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count, islice
from statistics import mean, median

import torch
from torch import nn

from fedraclora.config.build import PreparedTask, plan_of
from fedraclora.config.run_config import RunConfig
from fedraclora.errors import FedRacLoraError
from fedraclora.protocol.method import (
    Adapter,
    Draw,
    Factor,
    RoundInstructions,
    first_instructions,
)
from fedraclora.strategies.wrappers import method_of
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import weights_of

# c, by optimizer and trained factors.
FITTED = {
    "adamw": {"B": 55.0, "A": 55.0, "BA": 27.5, "R": 55.0},
    "sgd": {"B": 1.1, "A": 0.2, "BA": 0.1, "R": 1.1},
}
# From one method's tuned rates: 1.0 times under SGD on MNIST, 0.7 times under AdamW on STS-B.
DRAWN_TURNS = {"adamw": 0.5, "sgd": 1.0}
SHOWN = 32  # rounds, from which it is read which factors a method trains by turns
FIRST_RATES = {"sgd": 0.1, "own": 1.0}  # of the user's own function the rate is a factor
FIRST_ADAPTIVE = 0.003  # of optimizers whose steps have about the length of the rate
DENSE = 0.1  # whole weights: 0.00026 for layers of 384 inputs
NARROWEST = 96  # of the layers that c was fitted to: narrower ones would have huge rates
DEEPEST = 37  # adapted layers, of a transformer of six blocks and a pooler


def rule_rate(config: RunConfig, built: PreparedTask) -> float | None:
    """Compute the rate of the rule for a run of a task; None if the rule does not cover it."""
    local = config.local
    # SGD's rates follow the scale of gradients, which that of a cross-entropy bounds.
    unbounded = local.optimizer == "sgd" and built.task.loss == "squared_error"
    if local.is_own or not is_known(local) or unbounded:
        return None
    first, *others = turns = turns_of(config, built)
    if not first.adapters and first.program.plain and local.optimizer == "adamw":
        return dense_rate(built.task.model)
    steps = steps_of(local, built)
    if others and all(_beside_drawn(turn) for turn in turns):
        known = [rate_of(turn, local.optimizer, steps) for turn in turns]
        rates = [DRAWN_TURNS[local.optimizer] * rate for rate in known if rate is not None]
        rate = min(rates) if len(rates) == len(known) else None
    else:
        rate = rate_of(_as_one(turns), local.optimizer, steps)
    return None if rate is None else float(f"{rate:.2g}")


def turns_of(config: RunConfig, built: PreparedTask) -> list[RoundInstructions]:
    """Return the first round, and of later rounds one for each other choice of trained factors."""
    rounds = rounds_of(config, built)
    first = next(rounds)
    turns = {_trained(first): first}
    if method_of(config, built.task).traits.varies:
        # A method of the user's may need the first round's results.
        with suppress(FedRacLoraError):
            for later in islice(rounds, SHOWN - 1):
                turns.setdefault(_trained(later), later)
    return list(turns.values())


def falls_late(config: RunConfig, built: PreparedTask) -> bool:
    """Return whether losses of the first rounds do not tell which rate ends best.

    On digits the rates that end best raise the loss of these rounds, under SGD where rounds train A
    beside a drawn B, always or by turns: of left sketches 0.036 has the lowest loss after 5 rounds,
    and 0.2 after 150.
    """
    if config.local.is_own or config.local.optimizer != "sgd":
        return False
    turns = turns_of(config, built)
    return any(_beside_drawn(t) and any(k.endswith("/A") for k in _trained(t)) for t in turns)


def _trained(sent: RoundInstructions) -> frozenset[str]:
    """Return the names of the factors that a round trains."""
    return frozenset(name for name, factor in sent.factors().items() if factor.trained)


def _beside_drawn(sent: RoundInstructions) -> bool:
    """Return whether each adapter has one trained factor, and one that is drawn."""
    return bool(sent.adapters) and all(
        adapter.trains_beside_shared
        and any(factor.drawing is not None for factor in adapter.factors.values())
        for adapter in sent.adapters.values()
    )


def _as_one(turns: Sequence[RoundInstructions]) -> RoundInstructions:
    """Mark factors as trained in the first round that later ones train in their place."""
    first, *others = turns
    adapters = dict(first.adapters)
    for later in others:
        for name in adapters.keys() & later.adapters.keys():
            trained = {k: f for k, f in later.adapters[name].factors.items() if f.trained}
            if trained.keys() <= adapters[name].factors.keys():
                factors = adapters[name].factors | trained
                adapters[name] = replace(adapters[name], factors=factors)
    return replace(first, adapters=adapters)


def first_rate(config: RunConfig, built: PreparedTask) -> float:
    """Return the rate from which a search begins where no rule knows the run."""
    kind = "own" if config.local.is_own else config.local.optimizer
    if kind in FIRST_RATES:
        return FIRST_RATES[kind]
    if next(rounds_of(config, built)).adapters:
        return FIRST_ADAPTIVE
    return dense_rate(built.task.model)


def dense_rate(model: nn.Module) -> float:
    """Return the rate of AdamW for whole weights, which falls with the inputs of a layer."""
    inputs = [w[0].numel() for w in weights_of(model).values() if w.dim() > 1]
    return float(f"{DENSE / median(inputs):.2g}") if inputs else FIRST_ADAPTIVE


def rounds_of(config: RunConfig, built: PreparedTask) -> Iterator[RoundInstructions]:
    """Yield what a run's method sends to clients, round by round, from the initial state."""
    plan, draw, base = plan_of(config, built.task), Draw(config.seed), weights_of(built.task.model)
    method = method_of(config, built.task)
    state = method.initial_state(base, plan, draw)
    for round_ in count(1):
        yield first_instructions(method, state, draw, built.cohort, round_=round_)


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
    """Compute the rate of the rule; None if it does not know the factors of a layer.

    Args:
        downlink: Of the first round.
        optimizer: ``adamw`` or ``sgd``.
        steps: Local steps of a client in a round.
    """
    rates = [layer_rate(adapter, optimizer, steps) for adapter in downlink.adapters.values()]
    known = [rate for rate in rates if rate is not None]
    if not known or len(known) < len(rates):
        return None
    deep = max(1.0, len(rates) / DEEPEST) if optimizer == "adamw" else 1.0
    return median(known) / math.sqrt(deep)


def layer_rate(adapter: Adapter, optimizer: str, steps: float) -> float | None:
    """Compute the rate of the rule for a layer; None for a product that it does not know."""
    trained = "".join(label for label, factor in adapter.factors.items() if factor.trained)
    inner = trained == "R"  # s B R A
    if trained not in FITTED[optimizer] or len(adapter.factors) != 2 + inner:
        return None
    B, *_, A = adapter.factors.values()
    (m, rank), (_, n) = B.shape, A.shape
    others = {"B": length_of(A), "A": length_of(B)}
    # How far a step moves the output, against one beside rows of length 1.
    reach = math.prod(others.values()) if inner else mean(others[label] for label in trained)
    scale, fitted = adapter.scale * reach, FITTED[optimizer][trained]
    if optimizer == "sgd":
        return fitted / scale**2
    wide = rank * max(NARROWEST, min(m, n)) * math.sqrt(steps)
    return fitted / (scale * wide) * (math.sqrt(m / rank) if inner else 1)


def length_of(factor: Factor) -> float:
    """Return the mean length of the rows of A or of the columns of B, along the longer side.

    A factor that clients train from zeros or from a draw counts as 1: it grows within a round.
    """
    if factor.numbers is not None:
        long = -1 if factor.shape[0] < factor.shape[1] else -2
        return float(torch.linalg.vector_norm(factor.numbers.double(), dim=long).mean())
    return 1.0 if factor.drawing is None else math.sqrt(factor.drawing.gram_scale)
