"""LoRA-RITE: an adaptive optimizer whose step does not depend on how a product is factored.

For B, with the partner T = A^T (n x r) in its polar form T = U R; for A with T = B, turned:

    unmagnified gradient   g = g_B R^+                            (m x r)
    transport              P = U^T U_old
    second moment          V <- b2 P V P^T + (1 - b2) g^T g / m   (r x r)
    escaped mass           e <- b2 (e + max_i |l_i(V) - l_i(P V P^T)|),  l_i the eigenvalues
    first moment           M <- b1 M P^T + (1 - b1) g (V + e I)^(-1/2)
    step                   B <- B - lr (weight_decay B + M R^+)

Both factors move from where they were before the step. B Q, Q^-1 A has the same product as B, A
for any regular Q, and takes the same step of the product, but for ``eps``: U turns by an orthogonal
matrix and all else with it. A factor at zero has no basis; its partner waits for it.

If the partner is frozen, U stays and nothing escapes: with orthonormal rows of A, only B moves,
under one r x r second moment. Tensors beside adapters take AdamW steps.

No extra bytes are sent. A client holds moments of r (m + n) + 2 r^2 numbers for each adapter, and
the bases, r (m + n) where both factors are trained.

References:
    Yen et al., *LoRA done RITE*, ICLR 2025, arXiv 2410.20625; g, P, M and the step are those of its
    algorithm.

Departures: V is a decaying mean with Adam's correction of both decays (b (1 - b^(t-1)) /
(1 - b^t)), and a mean over rows, and e decays with it, as in the authors' code; the algorithm sums
both. The escaped mass is always counted, where the code leaves it off unless asked, and then takes
the smaller of this fall of an eigenvalue and the fall of the trace: the former, but for rounding,
since P lengthens nothing. Bases are polar factors from Gram
matrices, where the code takes QR. Eigenvalues that rounding cannot tell from zero count as zero,
so that noise is not equilibrated. Clipping and skipping of unmagnified gradients, and the balance
of the factors' norms, are left out; ``local.clip`` clips the factors' own gradients, as torch does,
by clip / (norm + 1e-6), and a step that is clipped does depend on the split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from fedraclora.protocol.program import ClientChunk, Rates
from fedraclora.training.extras.pairs import FactorStep, Pair, gram
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.optimizer import CohortOptimizer
from fedraclora.tree import Tree

Polar = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LoraRite(FactorStep):
    """LoRA-RITE as the optimizer.

    Attributes:
        local: Its constants.
    """

    local: LocalConfig
    form: ClassVar[str] = "local.optimizer=lora_rite"
    ends_moments: ClassVar[bool] = True

    @override
    def optimizer(self, chunk: ClientChunk, rates: Rates) -> CohortOptimizer:
        return CohortRite(self.local, chunk.values, rates, self.pairs(chunk))


def negligible(height: int, dtype: torch.dtype) -> float:
    """Compute the relative size up to which a Gram matrix's eigenvalues are rounding errors.

    Args:
        height: Rows of the matrix whose Gram matrix it is.
        dtype: Its precision; the Gram matrix itself is float64.
    """
    return max((height * torch.finfo(dtype).eps) ** 2, 1e-13)  # the resolution of a float64 sum


def inverse_root(matrix: torch.Tensor, share: float, shift: torch.Tensor, eps: float) -> Polar:
    """Compute the eigenvalues of a symmetric matrix, and ``(matrix + shift I)^(-1/2)``.

    Args:
        matrix: [..., r, r], float64, without negative eigenvalues but for rounding.
        share: Of the largest eigenvalue; those up to it have the inverse 0.
        shift: [...].
        eps: Is added to the roots.

    Returns:
        [..., r], ascending, and [..., r, r].
    """
    found, turn = torch.linalg.eigh(matrix)
    values = found.clamp(min=0) + shift[..., None]
    nonzero = values > share * values[..., -1:]
    roots = torch.where(nonzero, 1 / (values.sqrt() + eps), 0)
    return found, (turn * roots[..., None, :]) @ turn.mT


def polar(tall: torch.Tensor) -> Polar:
    """Compute U and R^+ of the polar form ``tall = U R``, both in the precision of ``tall``.

    Args:
        tall: [..., n, r]. Directions that it does not have are zero in both.
    """
    square = gram(tall)
    share, none = negligible(tall.shape[-2], tall.dtype), square.new_zeros(square.shape[:-2])
    inverse = inverse_root(square, share, none, 0.0)[1].to(tall.dtype)
    return tall @ inverse, inverse


class CohortRite(CohortOptimizer):
    """Run LoRA-RITE on the adapters of a chunk, and AdamW on other trained tensors.

    Args:
        config: Local settings.
        values: The tensors that are trained, [K, ...]; updated in place by `step`.
        rates: Step size of each.
        pairs: The adapters.
    """

    def __init__(
        self, config: LocalConfig, values: Tree, rates: dict[str, float], pairs: list[Pair]
    ) -> None:
        super().__init__(config, values, rates)
        self.pairs = pairs
        self.bases: Tree = {}
        self.escaped: Tree = {}

    @override
    def step(self, gradients: Tree) -> None:
        self.count += 1
        moves: Tree = {}
        for pair in self.pairs:
            nb, na = pair.names
            own = {n: self.values[n][: len(gradients[n])] for n in pair.names if n in gradients}
            B, A = pair.factors(own)
            if nb in gradients:
                moves[nb] = self._move(nb, gradients[nb], A.mT, moving=na in gradients)
            if na in gradients:
                moves[na] = self._move(na, gradients[na].mT, B, moving=nb in gradients).mT
        for name, gradient in gradients.items():
            value = self.values[name][: len(gradient)]
            if name in moves:
                value.mul_(1 - self.rates[name] * self.config.weight_decay)
                value.add_(moves[name], alpha=-self.rates[name])
            else:
                self._adamw(name, value, gradient)

    def _move(
        self, name: str, gradient: torch.Tensor, partner: torch.Tensor, *, moving: bool
    ) -> torch.Tensor:
        """Update the state of a factor; return its direction, [active, rows, r].

        Args:
            name: Of the factor.
            gradient: [active, rows, r].
            partner: The other factor, [active, n, r] or [n, r].
            moving: Whether the partner is trained, so that its basis turns.
        """
        active, rows, r = gradient.shape
        basis, inverse = polar(partner)
        g = gradient @ inverse
        if name not in self.first:
            K = len(self.values[name])
            self.first[name] = gradient.new_zeros(K, rows, r)
            self.second[name] = gradient.new_zeros(K, r, r, dtype=torch.float64)
            self.escaped[name] = gradient.new_zeros(K, dtype=torch.float64)
            if moving:
                self.bases[name] = partner.new_zeros(K, *partner.shape[1:])
        M, V, e = (tensors[name][:active] for tensors in (self.first, self.second, self.escaped))
        # Decay rates that make averages from the first step on, like Adam's bias correction.
        b1, b2 = (
            beta * (1 - beta ** (self.count - 1)) / (1 - beta**self.count)
            for beta in (self.config.beta1, self.config.beta2)
        )
        if moving:
            old = self.bases[name][:active]
            P = basis.mT @ old
            old.copy_(basis)
            M.copy_(M @ P.mT)
            wide = P.to(torch.float64)
            turned = wide @ V @ wide.mT
            lost = torch.linalg.eigvalsh(V) - torch.linalg.eigvalsh(turned)
            e.add_(lost.abs().amax(dim=-1)).mul_(b2)
            V.copy_(turned)
        V.mul_(b2).add_(gram(g), alpha=(1 - b2) / rows)
        whitening = inverse_root(V, negligible(rows, g.dtype), e, self.config.eps)[1]
        M.lerp_(g @ whitening.to(g.dtype), 1 - b1)
        return M @ inverse
