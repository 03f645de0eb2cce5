"""RAVAN: several heads, each with a small trained core between two frozen factors.

    B_i (m x r) and A_i (r x n) drawn once for the heads i = 1..h
    client k: trains all cores H_ik (r x r) from H_i;   H_i <- sum_k p_k H_ik
    effective weight W + s sum_i B_i H_i A_i, with H_i = 0 at the start

The heads are the diagonal blocks of one core of h r rows: the rank is h r for h r^2 parameters.
The directions of all heads are orthogonal under drawings with orthonormal rows, the default.

- Uplink: (h r)^2 numbers per matrix and client, the zeros beside the blocks included, where h r^2
  would do. Downlink: two seeds, and (h r)^2 numbers after the first round.
- Aggregation: exact and linear: the factors about the cores are the same everywhere.
- Server: one mean, K (h r)^2 operations.
- Source: Raje et al., *Ravan: multi-head low-rank adaptation for federated fine-tuning*, NeurIPS
  2025, arXiv 2506.05568.
- Departures: the trained scalar of each head is left out: clients upload its product with H_i, and
  only the local steps differ. All clients train all heads.
- Unverified: only the abstract and summaries were read: how the factors begin, what the cores start
  from, the scale, and which heads a small client trains.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.limits import Count
from fedraclora.protocol.method import Plan
from fedraclora.strategies.fed_sb import FedSb


@dataclass(frozen=True)
class Ravan(FedSb):
    """RAVAN: several heads, each a small trained core between two frozen factors.

    The rank is that of one head, bounded by the smaller side over h.

    Attributes:
        initial: How the factors are drawn, a key of `fedraclora.sketch.SKETCHES`.
        heads: h, cores of the rank each.
    """

    recipe = "block_diagonal"
    parts_are = "heads (method.heads)"

    heads: Count = 2

    @override
    def arguments(self, plan: Plan) -> dict[str, float | int]:
        return {"blocks": self.heads}

    @property
    @override
    def parts(self) -> int:
        return self.heads  # the diagonal blocks of one core
