"""Allocate ranks to layers by what clients send (config group ``allocation``).

A rule scores and chooses layers; `strategies.wrappers.allocated` asks clients and passes the choice
to the method.

SYNFLOW measures how much of a network's flow passes through each adapter, without data:

    R = 1^T f(1), f the network with every parameter by its magnitude: effective weights are then
    |W| + s |B| |A|;  score of a layer: sum |theta dR/dtheta| over its trained factors

If one factor is zero, every score is 0. The network is used unchanged, in evaluation mode: its
activations stay, while the paper assumes linear ones.

References:
    Zhang et al., *Unlocking the global synergies in low-rank adapters* (HeteroLoRA), 2024, arXiv
    2406.14956, and its public code; the proxies: Abdelfattah et al., *Zero-cost proxies for
    lightweight NAS*, ICLR 2021, arXiv 2101.08134.
    Tanaka et al., *Pruning neural networks without any data by iteratively conserving synaptic
    flow*, NeurIPS 2020, arXiv 2006.05467; for adapters: HeteroLoRA, arXiv 2406.14956, whose public
    code takes the loss for R.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import nn
from torch.func import functional_call
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError
from fedraclora.limits import Chance, Count, Fraction, Limited, OneOf, Positive
from fedraclora.protocol.method import ASKS_TWICE, Plan, RoundInstructions
from fedraclora.training.gradients import gradients_of
from fedraclora.training.materialize import materialize
from fedraclora.training.vmapped import effective_weights
from fedraclora.tree import Tree


def gradient_norm(_values: Tree, gradients: Tree) -> float:
    """GRAD-NORM of one layer: ``sum ||g||_F`` over its trained factors; values are not read."""
    return sum(float(torch.linalg.norm(g.double())) for g in gradients.values())


def snip(values: Tree, gradients: Tree) -> float:
    """SNIP of one layer: ``sum |theta g|`` over the entries of its trained factors.

    A factor of zero adds nothing, and its partner has no gradient: if one factor begins at zero,
    every score is 0.
    """
    pairs = [(values[n].double(), g.double()) for n, g in gradients.items()]
    return sum(float((value * g).abs().sum()) for value, g in pairs)


PROXIES: dict[str, Callable[[Tree, Tree], float]] = {"grad_norm": gradient_norm, "snip": snip}
SYNFLOW = "synflow"  # without data: `fedraclora.allocation`
ALLOCATED = Feature(
    "rank allocation",
    instead="allocation=none",
    avoids={"system.rank_budget": "a budget is a share of one rank for all layers"},
)
CHOOSES_LAYERS = Feature(
    "allocation=heterolora",
    instead="allocation=none",
    avoids={
        "a method whose frozen factors recur": "they have a part of every layer",
        "a method that keeps a part of the model at each client": (
            "clients would lose what they keep of a layer that is left out"
        ),
        "a method that takes its first factors out of the weights": (
            "they are taken from all layers before some are chosen"
        ),
        "a method with counters of its own": ("the chosen layers are stored in the same place"),
        "a method whose clients do more than plain local steps": (
            "layers are chosen by the gradients of plain local steps"
        ),
        "a method that leaves some layers out": ("both choose the layers of a round"),
    },
)

CUTS_COMPONENTS = Feature(
    "allocation=adalora",
    instead="allocation=none",
    avoids={
        "a method that restarts its components": ("it scores components over many rounds"),
    },
)


@dataclass(frozen=True)
class Uniform(Limited, group="allocation"):
    """Give every adapted layer the method's rank."""

    name: ClassVar[str] = "none"


@ALLOCATED
@CHOOSES_LAYERS
@dataclass(frozen=True)
class HeteroLora(Uniform):
    """HeteroLoRA: clients send gradients, and only the layers with the highest scores are adapted.

    Attributes:
        proxy: The score, a key of `PROXIES`, or ``synflow``.
        share: Share of layers to adapt, (0, 1]; rounded down, at least one.
        every: Rounds between two choices of layers (dynamic); None: once, in the first round
            (static).
    """

    name: ClassVar[str] = "heterolora"

    proxy: Annotated[str, OneOf([*PROXIES, SYNFLOW])] = "grad_norm"
    share: Chance = 0.25
    every: Count | None = None

    @Feature(
        "allocation.every",
        instead="allocation.every=null",
        avoids={
            "a method whose next round needs more than the weights": (
                "the state of a layer that is left out would be lost"
            ),
            "a method that starts from the factors of the last merge": (
                "those of a layer that is left out would be lost"
            ),
        },
        requires={
            "a method that merges after every round": (
                "the training of a layer that is left out would be lost"
            ),
        },
    )
    def _chooses_again(self) -> str:
        return "" if self.every is None else f"allocation.every={self.every}"

    @ASKS_TWICE
    def _asks_gradients(self) -> str:
        return "" if self.proxy == SYNFLOW else f"allocation.proxy={self.proxy}"

    @Feature(
        "allocation.proxy=snip or synflow",
        instead="allocation.proxy=grad_norm",
        avoids={
            "a factor that begins at zero": (
                "values are multiplied by gradients, so every layer would have the score 0"
            ),
        },
    )
    def _multiplies_values(self) -> str:
        return "" if self.proxy == "grad_norm" else f"allocation.proxy={self.proxy}"

    def due(self, round_: int) -> bool:
        """Return whether layers are chosen in a round (from 1)."""
        return round_ == 1 if self.every is None else (round_ - 1) % self.every == 0

    def scores(self, values: Mapping[str, Tree], gradients: Mapping[str, Tree]) -> dict[str, float]:
        """Score layers by the clients' gradients.

        Args:
            values: Trained factors of each layer at the clients' start.
            gradients: Their gradients of the mean loss over the round's clients.
        """
        score = PROXIES[self.proxy]
        return {name: score(values[name], g) for name, g in gradients.items()}

    def chosen(self, scores: Mapping[str, float]) -> list[str]:
        """Choose the layers to adapt, in model order; among equal scores the first.

        Raises:
            ConfigError: If all scores are zero.

        Example:
            >>> HeteroLora(share=0.5).chosen({"a": 1.0, "b": 3.0, "c": 2.0, "d": 3.0})
            ['b', 'd']
        """
        if not any(scores.values()):
            raise ConfigError(
                f"allocation.proxy={self.proxy}, which scores every layer 0 where a factor "
                "begins at zero; take proxy=grad_norm, or a start of both (method.init)"
            )
        count = max(1, math.floor(self.share * len(scores)))
        best = sorted(scores, key=lambda name: -scores[name])[:count]
        return [name for name in scores if name in best]


@ALLOCATED
@CUTS_COMPONENTS
@dataclass(frozen=True)
class AdaLora(Uniform):
    """AdaLoRA: cut components by importance, under a budget that falls with the rounds.

    With b_0 components over all layers at the start and b_T = ``target`` times the layers:

        b(t) = b_0                                            t <= begin
        b(t) = b_T + (b_0 - b_T) (1 - (t - begin) / (end - begin))^3   between, every so many rounds
        b(t) = b_T                                            t >= end

    Attributes:
        target: Mean rank of a layer at the end; a layer may have fewer components, or none.
        begin: Last round with all components.
        end: First round with the final budget.
        every: Rounds between two cuts.
        beta1: Smoothing of the importance, [0, 1).
        beta2: Smoothing of its uncertainty, [0, 1).

    References:
        Zhang et al., *AdaLoRA: adaptive budget allocation for parameter-efficient fine-tuning*,
        ICLR 2023, arXiv 2303.10512; schedule and defaults of the betas as in the PEFT library.
    """

    name: ClassVar[str] = "adalora"

    target: Positive = 4.0
    begin: int = 10
    end: int = 100
    every: Count = 1
    beta1: Fraction = 0.85
    beta2: Fraction = 0.85

    @override
    def __post_init__(self) -> None:
        """Reject impossible schedules."""
        super().__post_init__()
        if not 0 <= self.begin < self.end:
            raise ConfigError(
                f"allocation.begin={self.begin} and allocation.end={self.end}; "
                "expected 0 <= begin < end"
            )

    def budget(self, round_: int, first: int, layers: int) -> int | None:
        """Compute the number of components after a round, b(t); None if the round cuts none.

        Args:
            round_: From 1.
            first: Components at the start, b_0.
            layers: Adapted layers.

        Example:
            >>> rule = AdaLora(target=2, begin=2, end=6, every=2)
            >>> [rule.budget(t, first=30, layers=5) for t in range(1, 8)]
            [None, None, None, 12, None, 10, 10]
        """
        last = round(self.target * layers)
        if round_ >= self.end:
            return last
        if round_ <= self.begin or round_ % self.every:
            return None
        left = 1 - (round_ - self.begin) / (self.end - self.begin)
        return int(last + (first - last) * left**3)

    def smoothed(
        self,
        old: tuple[torch.Tensor, torch.Tensor] | None,
        value: torch.Tensor,
        slope: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Smooth the importance and the uncertainty of the entries of one factor.

            I = |theta g|;  I_bar <- beta1 I_bar + (1 - beta1) I
            U_bar <- beta2 U_bar + (1 - beta2) |I - I_bar|

        Args:
            old: Both previous values; None: zero.
            value: theta.
            slope: g, of the same shape.
        """
        now = (value * slope).abs()
        mean, spread = old or (torch.zeros_like(now), torch.zeros_like(now))
        mean = self.beta1 * mean + (1 - self.beta1) * now
        return mean, self.beta2 * spread + (1 - self.beta2) * (now - mean).abs()


def component_scores(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Score each component by its column of B and its row of A: the sum of their means.

    Args:
        B: Scores of entries, [m, r].
        A: Scores of entries, [r, n].

    Returns:
        [r].
    """
    return B.mean(dim=0) + A.mean(dim=1)


def kept_components(scores: Mapping[str, torch.Tensor], budget: int) -> dict[str, torch.Tensor]:
    """Choose the components with the highest scores over all layers: ordered indices by layer.

    Among equal scores, the first layer's are kept.

    Example:
        >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.5, 4.0])}
        >>> {n: t.tolist() for n, t in kept_components(scores, 3).items()}
        {'a': [0], 'b': [0, 2]}
    """
    order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[:budget].cpu()] = True
    parts = chosen.split([len(s) for s in scores.values()])
    return {n: torch.nonzero(p).flatten() for n, p in zip(scores, parts, strict=True)}


ALLOCATIONS: dict[str, type[Uniform]] = {kind.name: kind for kind in (Uniform, HeteroLora, AdaLora)}


def flows(
    model: nn.Module, like: Samples, base: Tree, sent: RoundInstructions, plan: Plan
) -> dict[str, float]:
    """Score every adapter of a downlink by SYNFLOW.

    Args:
        model: The network. Not modified.
        like: Samples of the task, for the shape of an input.
        base: The base weights.
        sent: The downlink of the clients' start; for personal starts the first client's is used.
        plan: Views of the adapted matrices.

    Returns:
        Scores by weight, in the order of the downlink.

    Raises:
        ConfigError: If an input is not one tensor of floating-point numbers, to be set to ones.
    """
    x = like.inputs.get("x")
    if set(like.inputs) != {"x"} or x is None or not x.is_floating_point():
        raise ConfigError(
            "allocation.proxy is synflow, which puts ones in the place of all inputs, but the "
            f"inputs of these data are {', '.join(like.inputs)}, and not numbers alone; take "
            "proxy=grad_norm"
        )
    wide = {name: tensor.double().abs() for name, tensor in base.items()}
    trained, _, frozen = materialize(sent, wide, torch.tensor([0]))
    values = {n: t[0].abs() for n, t in trained.items()}
    frozen = {n: (t[0] if t.dim() == 3 else t).abs() for n, t in frozen.items()}
    leaves = {n: values[n].requires_grad_() for n in values if n not in sent.dense}
    weights = effective_weights(wide, sent, plan, values, frozen)
    network = copy.deepcopy(model).double().eval()
    output = functional_call(network, weights, (torch.ones_like(x[:1], dtype=torch.float64),))
    scores = dict.fromkeys(sent.adapters, 0.0)
    for name, gradient in gradients_of(output, leaves).items():
        product = leaves[name].detach() * gradient
        scores[name.rpartition("/")[0]] += float(product.abs().sum())
    return scores
