"""Fed-SB: clients train a small core between two frozen factors.

    B (m x r) and A (r x n) drawn once;  client k: trains R_k (r x r) from R
    R <- sum_k p_k R_k;   effective weight W + s B R A, with R = 0 at the start

- Uplink: r^2 numbers per matrix and client.
- Downlink: two seeds in the first round, then r^2 numbers.
- Aggregation: exact and linear, because all clients have the same frozen factors.
- Server: one mean, K r^2 operations.
- Source: Singhal et al., *Fed-SB: a silver bullet for extreme communication efficiency and
  performance in (private) federated LoRA fine-tuning*, arXiv 2502.15436; LoRA-SB: arXiv 2411.19557.
- Held to: putssander/fed-sb at 1d437e4: the server's step, 3 rounds.
- Departures: B and A are drawn with orthonormal columns and rows, and R starts at zero, so that a
  run starts from W. LoRA-SB computes all three from the singular value decomposition of a gradient
  that clients average before the first round. That start costs up to m n numbers per client, and
  the factors have to be sent. Our start costs the bytes above, but the subspace does not depend on
  the data: results of this implementation are not those of the paper's method.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedraclora.strategies.shared.factors import CoreMethod


@dataclass(frozen=True)
class FedSb(CoreMethod):
    """Fed-SB: a small core trained between two frozen factors, which are drawn.

    Attributes:
        init: How B and A are drawn, a key of `fedraclora.sketch.SKETCHES`.
    """
