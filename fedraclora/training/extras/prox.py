"""FedProx on effective weights: the gradient of (mu/2) ||W_eff - W_start||^2 per trained tensor.

For a low-rank term ``s B A`` the penalty is (mu s^2 / 2) ||B A - B_0 A_0||_F^2, so its gradients
need only r x r Gram matrices and never an m x n product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.protocol.method import RoundInstructions
from fedraclora.protocol.program import ClientChunk, ClientProgram, GradientStage, Hook
from fedraclora.training.materialize import factor_of
from fedraclora.tree import Tree


@dataclass(frozen=True)
class Prox(ClientProgram):
    """Pull weights to where the round started.

    Attributes:
        mu: Its strength.
    """

    mu: float
    form: ClassVar[str] = "local.prox={mu}"

    @Feature(
        "local.prox",
        instead="local.prox=0",
        avoids={
            "a method that estimates gradients from losses": (
                "there is no gradient to which the proximal term is added"
            ),
            "dora=true": "a rescaled weight is not the sum of the base and a low-rank term",
            "adapters with three factors that train an outer one": (
                "its gradient is defined for B A, and for R in B R A"
            ),
        },
    )
    def _pulls(self) -> str:
        return self.setting

    @override
    def hooks(self, chunk: ClientChunk) -> dict[GradientStage, Hook]:
        starts, frozen, downlink = chunk.starts, chunk.frozen, chunk.downlink
        pull = partial(with_prox, starts=starts, frozen=frozen, downlink=downlink, mu=self.mu)
        return {GradientStage.LOSS: pull}


def with_prox(
    gradients: Tree,
    leaves: Tree,
    *,
    starts: Tree,
    frozen: Tree,
    downlink: RoundInstructions,
    mu: float,
) -> Tree:
    """Add the proximal gradient to gradients, as a new tree.

    Args:
        gradients: [active, ...] by trained name.
        leaves: Current values, [active, ...].
        starts: Values at the round's start, [1, ...] or [K, ...].
        frozen: Frozen factors by "<weight>/<label>", 2-D or [K, ...].
        downlink: Says which tensors form which term.
        mu: Strength of the pull.

    References:
        Li et al., *Federated optimization in heterogeneous networks*, arXiv 1812.06127.
    """
    out, active = dict(gradients), len(next(iter(leaves.values()), ()))
    begun = {n: t[:active] for n, t in starts.items()}
    for name in downlink.dense:
        out[name] = gradients[name] + mu * (leaves[name] - begun[name])
    for weight, adapter in downlink.adapters.items():
        names, pull = [f"{weight}/{label}" for label in adapter.factors], mu * adapter.scale**2
        now, then = ([factor_of(n, own, frozen, active) for n in names] for own in (leaves, begun))
        if len(adapter.factors) == 3:  # R is trained alone
            left, R, right = now
            moved = left.mT @ left @ (R - then[1]) @ right @ right.mT
            out[names[1]] = gradients[names[1]] + pull * moved
            continue
        (nb, na), (B, A), (B0, A0) = names, now, then
        if nb in gradients:
            out[nb] = gradients[nb] + pull * (B @ (A @ A.mT) - B0 @ (A0 @ A.mT))
        if na in gradients:
            out[na] = gradients[na] + pull * ((B.mT @ B) @ A - (B.mT @ B0) @ A0)
    return out
