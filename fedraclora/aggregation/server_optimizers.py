"""Server optimizers (FedOpt): use the mean change of a round as a gradient.

    Delta_t   the change that the method would make in round t: old weights to new ones
    momentum  M <- beta M + Delta;                       step = lr M
    others    M <- beta1 M + (1 - beta1) Delta;          step = lr M / (sqrt(V) + tau)
      adagrad V <- V + Delta^2
      adam    V <- beta2 V + (1 - beta2) Delta^2
      yogi    V <- V - (1 - beta2) Delta^2 sign(V - Delta^2)

V begins at tau^2, without bias correction, as in the paper. `strategies.steps.fedopt` decides
whether the formulas are applied to weights or to factors.

References:
    Reddi et al., *Adaptive federated optimization*, ICLR 2021, arXiv 2003.00295, algorithm 2;
    Hsu, Qi and Brown, *Measuring the effects of non-identical data distribution for federated
    visual classification*, arXiv 1909.06335 (FedAvgM, the momentum).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.limits import Fraction, Limited, OneOf, Positive
from fedraclora.tree import Tree

Space = Annotated[str, OneOf(("weights", "factors"))]


@dataclass(frozen=True)
class ServerOptimizer(Limited, group="server_optimizer"):
    """No server optimizer: the server applies the clients' mean unchanged.

    Attributes:
        name: Its key in the config.
        adapts: Whether it scales each coordinate by its own second moment.
    """

    name: ClassVar[str] = "none"
    adapts: ClassVar[bool] = False
    space = "weights"

    def advance(self, change: Tree, moments: Tree) -> tuple[Tree, Tree]:
        """Compute the server's steps and the new moments.

        Args:
            change: Delta by name, float64.
            moments: ``first/<name>`` and ``second/<name>``; empty in the first round.

        Returns:
            Steps by name and moments, float64, as new tensors.
        """
        return dict(change), dict(moments)

    def _steps_in(self, space: str) -> bool:
        return self.name != "none" and self.space == space

    @Feature(
        "server_optimizer.space=weights",
        instead="server_optimizer=none or space=factors",
        avoids={
            "a method whose clients send numbers along random directions": (
                "its steps would have to be sent as whole weights"
            ),
            "a method that keeps a part of the model at each client": (
                "the server does not have the clients' weights"
            ),
            "dora=true": "a step of a base weight is not a step of the rescaled weight",
        },
    )
    def _steps_in_weights(self) -> bool:
        return self._steps_in("weights")

    @Feature(
        "server_optimizer.space=factors",
        instead="server_optimizer=none or space=weights",
        avoids={
            "a method that needs each client's update": "it needs the mean of the clients' factors",
            "a method whose clients send numbers along random directions": (
                "the directions differ from round to round"
            ),
            "a method whose clients send gradients first": (
                "what clients train is chosen after the gradients"
            ),
            "a method that restarts its factors at each merge": (
                "the moments would have to restart, too"
            ),
            "clients that start from different factors": (
                "the mean of their updates has no common start"
            ),
            "rank allocation": "it changes which parameters have moments",
        },
    )
    def _steps_in_factors(self) -> bool:
        return self._steps_in("factors")

    @Feature(
        "an adaptive server_optimizer with space=factors",
        instead="server_optimizer=momentum, server_optimizer=none or space=weights",
        avoids={
            "a method that changes the frozen factors at each merge": (
                "it scales each coordinate by its history, and the coordinates change"
            ),
            "a method that has changed its frozen factors": (
                "it scales each coordinate by its history, and the coordinates have changed"
            ),
        },
    )
    def _scales_factors(self) -> bool:
        return self._steps_in("factors") and self.adapts


@dataclass(frozen=True)
class Momentum(ServerOptimizer):
    """FedAvgM: server momentum.

    Attributes:
        lr: Step size; 1 adds the momentum unscaled.
        beta: Share of the momentum that a round keeps, in [0, 1).
        space: ``weights``: dense moments; ``factors``: moments of the trained factors.
    """

    name: ClassVar[str] = "momentum"

    lr: Positive = 1.0
    beta: Fraction = 0.9
    space: Space = "weights"

    @override
    def advance(self, change: Tree, moments: Tree) -> tuple[Tree, Tree]:
        first = {
            n: d + self.beta * moments[f"first/{n}"].to(d) if f"first/{n}" in moments else d.clone()
            for n, d in change.items()
        }
        new = moments | {f"first/{n}": m for n, m in first.items()}
        return {n: self.lr * m for n, m in first.items()}, new


@dataclass(frozen=True)
class Adaptive(ServerOptimizer, ABC):
    """Base of the adaptive server optimizers.

    Attributes:
        lr: Step size: the typical change of a coordinate in a round.
        beta1: Share of the first moment that a round keeps, in [0, 1).
        tau: Adaptivity: coordinates with changes much smaller than tau move by lr / tau of these.
        space: ``weights``: dense moments; ``factors``: those of what clients train.
    """

    adapts: ClassVar[bool] = True

    lr: Positive = 0.01
    beta1: Fraction = 0.9
    tau: Positive = 0.001
    space: Space = "weights"

    @abstractmethod
    def second(self, old: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Compute the new V from the old V and Delta^2."""

    @override
    def advance(self, change: Tree, moments: Tree) -> tuple[Tree, Tree]:
        steps, new = {}, dict(moments)
        for name, delta in change.items():
            old = moments.get(f"first/{name}", torch.zeros_like(delta)).to(delta)
            first = self.beta1 * old + (1 - self.beta1) * delta
            moment = moments.get(f"second/{name}", torch.full_like(delta, self.tau**2)).to(delta)
            second = self.second(moment, delta.square())
            new |= {f"first/{name}": first, f"second/{name}": second}
            steps[name] = self.lr * first / (second.sqrt() + self.tau)
        return steps, new


@dataclass(frozen=True)
class Adagrad(Adaptive):
    """FedAdagrad: coordinates that have moved much move less."""

    name: ClassVar[str] = "adagrad"

    beta1: Fraction = 0.0

    @override
    def second(self, old: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return old + square


@dataclass(frozen=True)
class Adam(Adaptive):
    """FedAdam: each coordinate moves by about lr in a round.

    Attributes:
        beta2: Share of the second moment that a round keeps, in [0, 1).
    """

    name: ClassVar[str] = "adam"

    beta2: Fraction = 0.99

    @override
    def second(self, old: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return self.beta2 * old + (1 - self.beta2) * square


@dataclass(frozen=True)
class Yogi(Adam):
    """FedYogi: like FedAdam, with slowly changing second moments.

    The second moment moves by no more than (1 - beta2) Delta^2.
    """

    name: ClassVar[str] = "yogi"

    @override
    def second(self, old: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return old - (1 - self.beta2) * square * torch.sign(old - square)


SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = {
    kind.name: kind for kind in (ServerOptimizer, Momentum, Adagrad, Adam, Yogi)
}
