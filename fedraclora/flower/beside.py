"""Combine other Flower strategies with `LowRank` in one class: ``class Mine(LowRank, FedAdam)``.

Clients of `LowRank` send factors, so another strategy would not see weights in replies. FedAdagrad,
FedAdam, FedYogi and FedAvgM only need the mean of a round: their own code computes the server's
step, which goes into the base weights (`fedraclora.strategies.steps.fedopt`). FedProx sends clients
a number. A class in which code of another strategy would be skipped is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import isfunction
from typing import ClassVar

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Strategy,
)
from flwr.serverapp.strategy.fedopt import FedOpt
from typing_extensions import override

from fedraclora.aggregation.server_optimizers import ServerOptimizer
from fedraclora.errors import ConfigError
from fedraclora.tree import Tree, to_numpy

SERVED = (FedAdagrad, FedAdam, FedYogi, FedAvgM, FedProx)
FLOWERS = (*SERVED, FedOpt, FedAvg, Strategy)
CHECKS = "_check_and_log_replies"  # methods of FedAvg that read weights
REPLIES = {"aggregate_train", "aggregate_evaluate", CHECKS}
EVERY = {n for kind in (FedAvg, Strategy) for n, it in vars(kind).items() if isfunction(it)}
SETTINGS = ("eta", "beta_1", "beta_2", "tau", "server_learning_rate", "server_momentum")


def refuse_skipped(kind: type, low_rank: type) -> None:
    """Refuse a class in which `LowRank` would skip code of another class.

    Args:
        kind: A subclass of `LowRank`.
        low_rank: `LowRank`.

    Raises:
        ConfigError: Naming the method that would be skipped, and what to do.
    """
    order, before = kind.__mro__, list[str]()
    ours, plain = order.index(low_rank), order.index(FedAvg)
    for place, each in enumerate(order[:-1]):
        foreign = issubclass(each, Strategy) and not issubclass(each, low_rank)
        names = EVERY - {"__init__"} if place > plain else REPLIES
        names = {CHECKS} if place < ours and not foreign else names
        found = sorted(names & {*vars(each)})
        if found and each is not low_rank and each not in FLOWERS:
            raise ConfigError(
                f"{kind.__name__}: {each.__name__}.{found[0]} would be skipped beside LowRank, "
                "whose clients send factors, not weights. Use one of "
                f"{', '.join(served.__name__ for served in SERVED)}, or override the method in a "
                "class derived from LowRank. For robust aggregation use `fedraclora deploy`."
            )
        before += [each.__name__] if foreign and place < ours else []
    if before:
        raise ConfigError(
            f"{kind.__name__}: {before[0]} comes before LowRank, which keeps the weights. Write "
            f"class {kind.__name__}(LowRank, {before[0]})"
        )
    if {FedOpt, FedAvgM} <= {*order}:
        raise ConfigError(f"{kind.__name__} has two server optimizers of Flower: use one of them")


def shared_config(
    messages: Iterable[Message], strategy: FedAvg, arrays: ArrayRecord
) -> ConfigRecord:
    """Return the config that a strategy sends to its clients.

    Raises:
        ConfigError: If they contain values that `LowRank` does not send: changed arrays, more
            records, or a different config for each node.
    """
    contents = [{**message.content} for message in messages]
    given = [content.pop(strategy.arrayrecord_key, None) for content in contents]
    configs = [content.pop(strategy.configrecord_key, None) for content in contents]
    first = configs[0]
    alike = all(each == first for each in configs) and all(each is arrays for each in given)
    if any(contents) or not alike or not isinstance(first, ConfigRecord):
        raise ConfigError(
            f"{type(strategy).__name__} changes the messages of FedAvg (other arrays, more "
            "records or a config for each node), but LowRank sends its own. Put settings for "
            "all clients into config, or override the method in a class derived from LowRank."
        )
    return first


@dataclass(frozen=True)
class OwnStep(ServerOptimizer):
    """Compute the step of a Flower server optimizer, by its own code in float64.

    Attributes:
        strategy: An instance of `FedOpt` or `FedAvgM`, whose settings are used.
        aggregate: Its ``aggregate_train`` for one reply: the mean of a round.
    """

    name: ClassVar[str] = "flower"
    adapts: ClassVar[bool] = True

    strategy: FedOpt | FedAvgM
    aggregate: Callable[[Message], ArrayRecord]

    @property
    def settings(self) -> str:
        """Return its class and its numbers, by which a checkpoint recognizes it."""
        kind = next(each for each in type(self.strategy).__mro__ if each in SERVED)
        numbers = (
            f"{n}={v}" for n in SETTINGS if (v := getattr(self.strategy, n, None)) is not None
        )
        return f"{kind.__name__}({', '.join(numbers)})"

    @override
    def advance(self, change: Tree, moments: Tree) -> tuple[Tree, Tree]:
        live = [n for n, d in change.items() if f"first/{n}" in moments or bool(d.any())]
        first, second = (
            {n: moments.get(f"{kind}/{n}", torch.zeros_like(change[n])).double() for n in live}
            for kind in ("first", "second")
        )
        zeros = {n: np.zeros(change[n].shape) for n in live}
        of, kept = self.strategy, dict(moments)
        if isinstance(of, FedOpt):
            of.current_arrays = zeros
            of.m_t, of.v_t = ({n: to_numpy(t) for n, t in each.items()} for each in (first, second))
        else:  # its momentum is that of pseudo-gradients, which point backwards
            of.current_arrays = ArrayRecord({n: Array(z) for n, z in zeros.items()})
            of.momentum_vector = [to_numpy(-t) for t in first.values()]
        mean = ArrayRecord({n: Array(to_numpy(change[n])) for n in live})
        metrics = MetricRecord({of.weighted_by_key: 1})
        content = RecordDict({of.arrayrecord_key: mean, "metrics": metrics})
        stepped = self.aggregate(Message(content, 0, MessageType.TRAIN))
        steps = change | {n: torch.from_numpy(stepped[n].numpy()) for n in live}
        if isinstance(of, FedOpt):
            after = {"first": of.m_t or {}, "second": of.v_t or {}}
        else:
            pairs = zip(live, of.momentum_vector or (), strict=True)
            after = {"first": {n: -m for n, m in pairs} if of.server_momentum else {}}
        for kind, each in after.items():
            kept |= {f"{kind}/{n}": torch.from_numpy(m) for n, m in each.items()}
        return steps, kept
