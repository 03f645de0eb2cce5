"""Fed-SB: a small core is trained between two frozen factors.

    B (m x r) and A (r x n) drawn once;  client k: trains R_k (r x r) from R
    R <- sum_k p_k R_k;   effective weight W + s B R A, with R = 0 at the start

- Uplink: r^2 numbers per matrix and client. Downlink: two seeds, and r^2 numbers after the first
  round.
- Aggregation: exact and linear: the factors about the core are the same everywhere.
- Server: one mean, K r^2 operations.
- Source: Singhal et al., *Fed-SB: a silver bullet for extreme communication efficiency and
  performance in (private) federated LoRA fine-tuning*, arXiv 2502.15436; LoRA-SB: arXiv 2411.19557.
- Departures: B and A are drawn, with orthonormal columns and rows, where LoRA-SB takes the singular
  vectors of a gradient that clients average before the first round; and R starts at zero, so that
  a run starts from W, where LoRA-SB's starts at the singular values. That start costs up to m n
  numbers per client, and factors that must be sent: without it the bytes are those above, and the
  subspace knows nothing of the data. Its figures are not those of the paper's method.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedraclora.strategies.shared.factors import Cored


@dataclass(frozen=True)
class FedSb(Cored):
    """Fed-SB: a small core trained between two frozen factors, which are drawn.

    Attributes:
        init: How B and A are drawn, a key of `fedraclora.sketch.SKETCHES`.
    """
