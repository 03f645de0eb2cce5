"""Which layers have which rank: rules that look at what clients send (config group ``allocation``).

A rule scores and chooses; `strategies.allocated` asks clients and hands the choice to the method.

References:
    Zhang et al., *Unlocking the global synergies in low-rank adapters* (HeteroLoRA), 2024, arXiv
    2406.14956, and its public code; the proxies: Abdelfattah et al., *Zero-cost proxies for
    lightweight NAS*, ICLR 2021, arXiv 2101.08134.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedraclora.errors import ConfigError, unknown
from fedraclora.tree import Tree


def gradient_norm(values: Tree, gradients: Tree) -> float:
    """GRAD-NORM of one layer: ``sum ||g||_F`` over its trained factors; values are not read."""
    del values
    return sum(float(torch.linalg.norm(g.double())) for g in gradients.values())


def snip(values: Tree, gradients: Tree) -> float:
    """SNIP of one layer: ``sum |theta g|`` over the entries of its trained factors.

    A factor at zero adds nothing, and beside it the other has no gradient: where one factor begins
    at zero every score is 0.
    """
    pairs = [(values[n].double(), g.double()) for n, g in gradients.items()]
    return sum(float((value * g).abs().sum()) for value, g in pairs)


PROXIES: dict[str, Callable[[Tree, Tree], float]] = {"grad_norm": gradient_norm, "snip": snip}


@dataclass(frozen=True)
class Uniform:
    """Every adapted layer has the method's rank."""

    name: ClassVar[str] = "none"


@dataclass(frozen=True)
class HeteroLora(Uniform):
    """The layers of highest score are adapted, at the method's rank, and the others are not.

    Attributes:
        proxy: The score, a key of `PROXIES`.
        share: Of the layers that are adapted, (0, 1]; rounded down, at least one.
        every: Rounds after which the layers are chosen anew (dynamic); None: once, in the first
            round (static).
    """

    name: ClassVar[str] = "heterolora"

    proxy: str = "grad_norm"
    share: float = 0.25
    every: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot choose."""
        if self.proxy not in PROXIES:
            raise unknown("allocation.proxy", self.proxy, PROXIES)
        if not 0 < self.share <= 1:
            raise ConfigError(f"allocation.share is {self.share}; a share in (0, 1] is wanted")
        if self.every is not None and self.every < 1:
            raise ConfigError(
                f"allocation.every is {self.every}; rounds, 1 or more, or null (once), are wanted"
            )

    def due(self, round_: int) -> bool:
        """Whether layers are chosen in a round (from 1)."""
        return round_ == 1 if self.every is None else (round_ - 1) % self.every == 0

    def chosen(self, values: Mapping[str, Tree], gradients: Mapping[str, Tree]) -> list[str]:
        """Choose the layers that are adapted, in their order.

        Args:
            values: Trained factors of each layer where clients start.
            gradients: Of the same, of the mean loss of the cohort.

        Raises:
            ConfigError: If all scores are zero, which say nothing.

        Example:
            >>> g = {n: {"B": torch.full((2, 1), x)} for n, x in (("a", 1.0), ("b", 3.0))}
            >>> HeteroLora(share=0.5).chosen(g, g)
            ['b']
        """
        score = PROXIES[self.proxy]
        scores = {name: score(values[name], g) for name, g in gradients.items()}
        if not any(scores.values()):
            raise ConfigError(
                f"allocation.proxy is {self.proxy}, which scores every layer 0 where a factor "
                "begins at zero; take proxy=grad_norm, or a start of both (method.initial)"
            )
        count = max(1, math.floor(self.share * len(scores)))
        best = sorted(scores, key=lambda name: -scores[name])[:count]  # stable: the first of equals
        return [name for name in scores if name in best]


ALLOCATIONS: dict[str, type[Uniform]] = {kind.name: kind for kind in (Uniform, HeteroLora)}
