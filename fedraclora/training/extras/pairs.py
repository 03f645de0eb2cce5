"""Adjust the gradients of an adapter's two factors by each other before the optimizer's step.

With G the gradient of the weight W + s B A, the factors have g_B = s G A^T and g_A = s B^T G: each
is scaled by the other one, so a plain step depends on how the product is split between them.
``local.adjust`` takes that out, with d = ``local.damping`` and P_B = B (B^T B + d I)^-1 B^T:

    riemannian   g_B (A A^T + d I)^-1   and   (B^T B + d I)^-1 g_A
    lora_pro     s^-2 (I - P_B) g_B (A A^T + d I)^-1 - B X   and   s^-2 (B^T B + d I)^-1 g_A + X A
                 where   B^T B X + X A A^T = -s^-2 (B^T B + d I)^-1 g_A A^T

But for d, a step of SGD under ``riemannian`` moves the weight by -lr s^2 (G P_A + P_B G), and one
under ``lora_pro`` by -lr (G - (I - P_B) G (I - P_A)), to first order in lr: the nearest that a
change of the factors comes to -lr G. X leaves that as it is; it makes the adjusted gradients the
nearest to g_B and g_A among all that move the weight so.

Where one factor is frozen, both give the other one's gradient times the inverse Gram matrix of the
frozen one (``lora_pro`` over s^2, without P_B and X): projected SGD on the weight, the gradient of
LoRA-FA (Zhang et al., arXiv 2308.03303), and `projected` but for d.

No extra bytes are sent. Cost of a step: r x r algebra in float64 for each client and adapter, and
products of size r (m + n) r.

References:
    Zhang and Pilanci, *Riemannian preconditioned LoRA for fine-tuning foundation models*, ICML
    2024, arXiv 2402.02347; Wang et al., *LoRA-Pro: are low-rank adapters properly optimized?*,
    arXiv 2407.18242.

Departures: before AdamW the moments are those of the adjusted gradients, as in the scaled AdamW of
the first paper; the public code of LoRA-Pro keeps moments of full m x n gradients instead, which
is what low rank is there to avoid. Its damping is 1e-8, and 1e-6 is that of the first one's code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.lowrank.algebra import sylvester
from fedraclora.protocol.program import ClientChunk, ClientProgram, GradientStage, Hook
from fedraclora.protocol.rank_budgets import within
from fedraclora.training.materialize import factor_of
from fedraclora.tree import Tree


def projected(frozen: Tree, ranks: torch.Tensor | None = None) -> Callable[[Tree], Tree]:
    """Precondition by the frozen factor's Gram matrix: g_B (A A^T)^+, or (B^T B)^+ g_A.

    Plain SGD on the trained factor is then projected SGD on the weight, W - gamma G H_A with
    gamma = lr s^2, for any sketch. A tensor with no frozen partner keeps its gradient. A client
    with a rank budget projects on the components that it trains.

    Args:
        frozen: Frozen factors by "<weight>/<label>": A [r, n] or [K, r, n], B [m, r] or [K, m, r].
        ranks: Which components each client trains, as in `fedraclora.protocol.rank_budgets.spans`,
            or None.

    Returns:
        The hook for the round; the inverses are formed once, in float64.

    References:
        Zhang et al., *LoRA-FA*, arXiv 2308.03303; Malinovsky et al., arXiv 2410.08305, eq. (4).
    """
    inverses: Tree = {}
    for name, factor in frozen.items():
        weight, _, label = name.rpartition("/")
        wide = factor.to(torch.float64)
        gram = wide @ wide.mT if label == "A" else wide.mT @ wide
        partner = f"{weight}/{'B' if label == 'A' else 'A'}"
        budget = None if ranks is None else within(ranks, gram.shape[-1]).to(gram)
        if budget is not None and not bool(budget.all()):
            # The pseudo-inverse of a padded block is the padded pseudo-inverse of the block.
            gram = gram * budget[:, :, None] * budget[:, None, :]
        inverses[partner] = torch.linalg.pinv(gram, hermitian=True).to(factor.dtype)

    def change(name: str, gradient: torch.Tensor) -> torch.Tensor:
        inverse = inverses[name]
        if inverse.dim() == 3:  # one factor per client: the active clients come first
            inverse = inverse[: len(gradient)]
        return gradient @ inverse if name.endswith("/B") else inverse @ gradient

    def hook(gradients: Tree) -> Tree:
        return {n: change(n, g) if n in inverses else g for n, g in gradients.items()}

    return hook


@dataclass(frozen=True)
class Pair:
    """An adapter ``s B A`` of a chunk of clients.

    Attributes:
        weight: The adapted weight.
        scale: s.
        frozen: Its factors that are not trained, by name: 2-D where clients share them.
        budget: Which components each client has, bool [K, r], or None: all.
    """

    weight: str
    scale: float
    frozen: Tree
    budget: torch.Tensor | None = None

    @property
    def names(self) -> tuple[str, str]:
        """Names of B and A."""
        return f"{self.weight}/B", f"{self.weight}/A"

    def factors(self, values: Tree) -> tuple[torch.Tensor, torch.Tensor]:
        """Return B and A of the active clients, without components beyond their rank budgets.

        Args:
            values: Trained tensors, [active, ...] by name.

        Returns:
            [active, m, r] and [active, r, n], or 2-D if clients share them.
        """
        active = next(len(values[n]) for n in self.names if n in values)
        B, A = (factor_of(name, values, self.frozen, active) for name in self.names)
        if self.budget is None:
            return B, A
        budget = self.budget[:active].to(B)
        return B * budget[:, None], A * budget[..., None]


def gram(tall: torch.Tensor) -> torch.Tensor:
    """Compute ``tall^T tall`` of the last two axes, [..., r, r], in float64."""
    wide = tall.to(torch.float64)
    return wide.mT @ wide


def damped_inverse(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Compute ``(matrix + damping I)^-1`` of the last two axes."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse: torch.Tensor = torch.linalg.inv(matrix + damping * eye)
    return inverse


def riemannian(pair: Pair, gradients: Tree, values: Tree, damping: float) -> Tree:
    """Apply the Riemannian preconditioner to the gradients of a pair; see the module.

    Args:
        pair: The adapter.
        gradients: [active, ...] by name. Not modified.
        values: What is trained, [active, ...] by name.
        damping: d; with 0 the Gram matrices must be regular.
    """
    (nb, na), (B, A) = pair.names, pair.factors(values)
    out: Tree = {}
    if nb in gradients:
        out[nb] = gradients[nb] @ damped_inverse(gram(A.mT), damping).to(A.dtype)
    if na in gradients:
        out[na] = damped_inverse(gram(B), damping).to(B.dtype) @ gradients[na]
    return out


def lora_pro(pair: Pair, gradients: Tree, values: Tree, damping: float) -> Tree:
    """Adjust the gradients of a pair as LoRA-Pro does; arguments as in `riemannian`."""
    scaled = riemannian(pair, gradients, values, damping)
    scaled = {name: g / pair.scale**2 for name, g in scaled.items()}
    (nb, na), (B, A) = pair.names, pair.factors(values)
    if nb not in scaled or na not in scaled:
        return scaled
    gram_B, gram_A = gram(B), gram(A.mT)
    inside = damped_inverse(gram_B, damping).to(B.dtype) @ (B.mT @ scaled[nb])
    X = sylvester(gram_B, gram_A, -(scaled[na] @ A.mT).to(torch.float64)).to(B.dtype)
    return {nb: scaled[nb] - B @ inside - B @ X, na: scaled[na] + X @ A}


ADJUSTMENTS: dict[str, Callable[[Pair, Tree, Tree, float], Tree]] = {
    "riemannian": riemannian,
    "lora_pro": lora_pro,
}


class FactorStep(ClientProgram):
    """Base of settings that define how the factors of an adapter take a step."""

    takes_factor_step: ClassVar[bool] = True

    @Feature(
        "an optimizer for pairs of factors",
        instead="local=adamw without local.adjust, local.precondition and local.gate_penalty",
        avoids={
            "a second optimizer for pairs of factors": "a factor can take only one kind of step",
            "a method without adapters": "it needs factors to work on",
            "adapters with three factors": "it is defined for products of two factors, B A",
            "a method with its own rule for local steps": (
                "it mixes components that the method keeps apart"
            ),
        },
    )
    def _steps_factors(self) -> str:
        return self.setting

    def pairs(self, chunk: ClientChunk) -> list[Pair]:
        """List the adapters B A of a chunk; none of a probe, which is not followed by a step."""
        downlink = chunk.downlink
        if not downlink.program.trains:
            return []
        pairs = []
        for weight, adapter in downlink.adapters.items():
            fixed = {n: f for n, f in chunk.frozen.items() if n in (f"{weight}/B", f"{weight}/A")}
            rank, ranks = adapter.factors["A"].shape[0], chunk.ranks
            budget = None if ranks is None else within(ranks, rank)
            pairs.append(Pair(weight, adapter.scale, fixed, budget))
        return pairs


@dataclass(frozen=True)
class Precondition(FactorStep):
    """Multiply gradients by the inverse Gram matrix of the frozen factor (`projected`)."""

    form: ClassVar[str] = "local.precondition=true"

    @Feature(
        "local.precondition",
        instead="local.adjust=riemannian, by which each factor has the other's inverse",
        avoids={
            "adapters that train both factors": "it inverts the frozen factor, and there is none",
        },
    )
    def _inverts_frozen(self) -> bool:
        return True

    @override
    def hooks(self, chunk: ClientChunk) -> dict[GradientStage, Hook]:
        pairs = self.pairs(chunk)
        frozen = {n: f for pair in pairs for n, f in pair.frozen.items()}
        hook = projected(frozen, ranks=chunk.ranks)
        return {GradientStage.PROGRAM: lambda gradients, _: hook(gradients)}

    @override
    def step_in_weights(self, scale: float, gram: float) -> tuple[float, float]:
        return scale, 1.0


@dataclass(frozen=True)
class Adjustment(FactorStep):
    """Adjust the gradients of two factors by each other.

    Attributes:
        rule: A key of `ADJUSTMENTS`.
        damping: d; with 0 the Gram matrices must be regular.
    """

    rule: str
    damping: float
    form: ClassVar[str] = "local.adjust={rule}"

    @override
    def hooks(self, chunk: ClientChunk) -> dict[GradientStage, Hook]:
        pairs, rule = self.pairs(chunk), ADJUSTMENTS[self.rule]

        def adjust(gradients: Tree, values: Tree) -> Tree:
            out = dict(gradients)
            for pair in pairs:
                out |= rule(pair, gradients, values, self.damping)
            return out

        return {GradientStage.BUDGET: adjust}

    @override
    def step_in_weights(self, scale: float, gram: float) -> tuple[float, float]:
        return (1.0 if self.rule == "lora_pro" else scale), 1.0
