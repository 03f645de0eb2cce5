"""FedSVD: B is trained and averaged; then both factors come from the SVD of their product.

    client k: trains B_k from B under A;   B_bar = sum_k p_k B_k
    B_bar A = U S V^T;   B <- U S,  A <- V^T;   effective weight W + s B A

A keeps r orthonormal rows, which always span the same space: the SVD rotates the basis and adds no
new direction.

- Uplink: r m numbers per matrix and client. Downlink: a seed in the first round, then r (m + n).
- Aggregation: exact and linear: the rank of B_bar A is at most r, so that nothing is truncated.
- Server: one mean, then two QRs and an SVD of an r x r matrix, O((m + n) r^2).
- Source: Lee et al., *FedSVD: adaptive orthogonalization for private federated learning with LoRA*,
  NeurIPS 2025, arXiv 2505.12805.
- Held to: sw-programmer/FedSVD at 480898d: the server's step, 3 rounds.
- Departures: the first A is drawn with orthonormal rows. We compute the SVD from the factors; the
  public code forms the m x n product. The results are equal, except for rows of A without a
  singular value: here they stay in the span of A, in the code they are arbitrary. The head follows
  the settings of the run; the public code freezes it at random values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.lowrank.algebra import Product, fix_signs
from fedraclora.protocol.link import Term, matrices
from fedraclora.protocol.method import Traits
from fedraclora.strategies.shared.factors import DrawnFactorMethod
from fedraclora.strategies.shared.layerwise import (
    Factors,
    Layer,
    LayerUpdate,
    Replies,
    RoundContext,
)


@dataclass(frozen=True)
class FedSvd(DrawnFactorMethod):
    """FedSVD: B is trained and averaged; then both factors come from the SVD of their product."""

    traits = Traits(exact=True, linear=True, merges=False)
    carries = True
    keeps = ("A",)

    init: str = "orthonormal"

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        A = layer.carried.get("A", self.first(layer, now))
        return {"B": layer.trained("B"), "A": A}

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        B = replies.mean("B").to(layer.dtype)  # what a client could be sent, the server turns
        B, A = turned_to_singular_vectors(*matrices(Term.of((B, replies["A"]), layer.scale)))
        return LayerUpdate(carried={"B": B, "A": A})  # B <- U S, A <- V^T of B_bar A


def turned_to_singular_vectors(B: torch.Tensor, A: torch.Tensor) -> Product:
    """Compute U S, [m, r], and V^T, [r, n] with orthonormal rows, of B A; in float64.

    Where B A has fewer than r singular values (m < r), more rows of A's span make V^T whole.
    """
    ql, rl = torch.linalg.qr(B.to(torch.float64))
    qr, rr = torch.linalg.qr(A.to(torch.float64).mT)
    u, s, vt = torch.linalg.svd(rl @ rr.mT, full_matrices=True)
    left, right = fix_signs(ql @ u, vt[: len(s)] @ qr.mT)
    more, _ = fix_signs(qr @ vt[len(s) :].mT, vt[len(s) :])
    zeros = left.new_zeros(len(left), more.shape[1])
    return torch.cat([left * s, zeros], dim=1), torch.cat([right, more.mT])
