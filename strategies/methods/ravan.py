"""RAVAN: several heads, each with a small trained core between two frozen factors.

    B_i (m x r) and A_i (r x n) drawn once for the heads i = 1..h
    client k: trains all cores H_ik (r x r) from H_i;   H_i <- sum_k p_k H_ik
    effective weight W + s sum_i B_i H_i A_i, with H_i = 0 at the start

The cores of all heads are stored as the diagonal blocks of one matrix of h r rows: the rank is h r
with h r^2 parameters. By default drawings have orthonormal rows, so that the directions of all
heads are orthogonal.

- Uplink: (h r)^2 numbers per matrix and client, with the zeros beside the blocks (h r^2 would do).
- Downlink: two seeds in the first round, then (h r)^2 numbers.
- Aggregation: exact and linear, because all clients have the same frozen factors.
- Server: one mean, K (h r)^2 operations.
- Source: Raje et al., *Ravan: multi-head low-rank adaptation for federated fine-tuning*, NeurIPS
  2025, arXiv 2506.05568.
- Departures: the trained scalar of each head is left out. Clients send its product with H_i in the
  paper, so only the local steps differ. All clients train all heads. We assume orthonormal rows,
  over all heads, so that no head repeats another one's directions; H_i = 0, so that training begins
  at the weights; and the scale alpha / r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.limits import Count
from fedraclora.protocol.method import Plan
from fedraclora.protocol.program import ClientChunk, ClientProgram, GradientStage, Hook
from fedraclora.strategies.shared.common import column_parts
from fedraclora.strategies.shared.factors import CoreMethod
from fedraclora.tree import Tree


@dataclass(frozen=True)
class BlockDiagonal(ClientProgram, group="method"):
    """Let clients train only the diagonal blocks of the middle factor R.

    Attributes:
        blocks: The number of blocks; it divides the rows of R.
    """

    name = "block_diagonal"
    fixes = True

    blocks: Count

    def cut(self, gradient: torch.Tensor) -> torch.Tensor:
        """Set the entries of a gradient [K, r, r] outside the blocks to zero."""
        block = column_parts(gradient, self.blocks)
        return gradient.masked_fill(block[:, None] != block, 0)

    @override
    def hooks(self, chunk: ClientChunk) -> dict[GradientStage, Hook]:
        def hook(gradients: Tree, _: Tree) -> Tree:
            return {n: self.cut(g) if n.endswith("/R") else g for n, g in gradients.items()}

        return {GradientStage.PROGRAM: hook}


@dataclass(frozen=True)
class Ravan(CoreMethod):
    """RAVAN: several heads, each a small trained core between two frozen factors.

    The rank is that of one head, bounded by the smaller side over h.

    Attributes:
        init: How the factors are drawn, a key of `fedraclora.sketch.SKETCHES`.
        heads: h, cores of the rank each.
    """

    parts_are = "heads (method.heads)"

    heads: Count = 2

    @override
    def program(self, plan: Plan) -> BlockDiagonal:
        return BlockDiagonal(self.heads)

    @property
    @override
    def parts(self) -> int:
        return self.heads  # the diagonal blocks of one core
