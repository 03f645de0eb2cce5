"""FedMomentum: clients continue from the leading part of the mean product; the rest is merged.

    client k: trains (B_k, A_k) from (B, A)
    sum_k p_k B_k A_k = U S V^T;   B <- U_r S_r^(1/2),  A <- S_r^(1/2) V_r^T
    W <- W + s (sum_k p_k B_k A_k - B A)

- Uplink: r (m + n) numbers per matrix and client.
- Downlink: r (m + n) numbers after the first round, and the updates that the client missed: up to
  (K - 1) r (m + n) numbers per round, at most m n.
- Aggregation: exact. The server needs each client's own factors.
- Server: two QRs and a small SVD of the stacked factors, O((m + n) (K r)^2 + (K r)^3), and a merge
  of 2 m n (K - 1) r operations.
- Source: Yan et al., *FedMomentum: preserving LoRA training momentum in federated fine-tuning*,
  2026, arXiv 2603.08014.
- Departures: the SVD is exact, where the paper's is randomized; the whole rest is merged. The
  abstract says that the rest can be kept and merged later; here it is merged at once, so that the
  aggregate is exact. S goes into both factors by its root, as in ``flexlora``, which leaves the
  product as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.lowrank.algebra import padded_to, truncated_product
from fedraclora.protocol.method import Traits
from fedraclora.strategies.shared.factors import Factored
from fedraclora.strategies.shared.layerwise import Layer, LayerUpdate, Replies


@dataclass(frozen=True)
class FedMomentum(Factored):
    """FedMomentum: continue the leading part of the mean product, and merge the rest."""

    traits = Traits(exact=True, linear=False, merges=True)

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        left, right = replies.product()
        u, s, vt = truncated_product(left, right, left.shape[1])
        root, r = s.sqrt(), layer.rank
        B, A = u * root, root[:, None] * vt
        first = padded_to(B[:, :r], A[:r], r)
        return LayerUpdate(carried=dict(zip("BA", first, strict=True)), merged=(B[:, r:], A[r:]))
