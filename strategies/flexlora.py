"""FlexLoRA: the mean of the clients' products, cut to rank r and handed out again.

    client k: (B_k, A_k) from the first r_k components of (B, A), local steps on both
    sum_k p_k B_k A_k = U S V^T;   B <- U_r S_r^(1/2),  A <- S_r^(1/2) V_r^T
    effective weight W + s B A

- Uplink: r (m + n) numbers per matrix and client; r_k (m + n) under rank budgets. Downlink, after
  the first round: r (m + n), also under budgets: a client is sent its components and zeros.
- Aggregation: **not exact** by the cut to rank r; its error is reported each round as
  ``aggregation_error``. It needs each client's own factors.
- Server: two QRs and a small SVD of the stacked factors, O((m + n) (K r)^2 + (K r)^3).
- Source: Bai et al., *Federated fine-tuning of large language models under heterogeneous tasks and
  client resources*, NeurIPS 2024, arXiv 2402.11505.
- Departures: the scale is alpha / r for all, where the paper's is alpha / r_k; S is shared between
  the factors by its root, where the public code puts it into B (the product is the same, local
  steps are not).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from fedraclora.lowrank import balanced_factors
from fedraclora.method import Traits
from strategies.shared.factored import Conclusion, Factored
from strategies.shared.initials import STARTS
from strategies.shared.replies import Replies


@dataclass(frozen=True)
class FlexLora(Factored):
    """Hyperparameters of FlexLoRA.

    Attributes:
        rank: r; a fraction (0, 1] of the drawn side's dimension if written with a dot.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        rslora: Scale s = alpha / sqrt(r) instead.
        initial: How the drawn factor begins, a key of `fedraclora.sketch.SKETCHES`; or how both do,
            one of `strategies.shared.initials.STARTS`.
        side: ``right`` (A begins as a drawing, B at zero), ``left`` (the other way round), ``auto``
            (the larger factor is drawn).
        cap: Cut the rank at the drawn side's dimension, with a note; False refuses it.
    """

    truncates: ClassVar[bool] = True

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=False, linear=False, merges=False, ranks=self.initial not in STARTS)

    @override
    def conclude(self, replies: Replies) -> Conclusion:
        return Conclusion(carried=balanced_factors(*replies.product(), replies.rank))
