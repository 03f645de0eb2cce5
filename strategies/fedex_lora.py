"""FedEx-LoRA: FedAvg-LoRA with what separate averages miss added to the base weights.

    client k: (B_k, A_k) from (B_bar, A_bar), local steps on both
    B_bar <- sum_k p_k B_k;   A_bar <- sum_k p_k A_k
    W <- W + s (sum_k p_k B_k A_k - B_bar A_bar)

The residual is sum_k p_k (B_k - B_bar)(A_k - A_K), since sum_k p_k (B_k - B_bar) = 0: the last
client drops out, and the rank is (K - 1) r. ``residual_rank`` cuts it.

- Uplink: r (m + n) numbers per matrix and client. Downlink: the same after the first round, and
  what the client missed: (K - 1) r (m + n) numbers per link (residual_rank (m + n) where it is
  cut), at most m n.
- Aggregation: exact, unless the residual is cut: then its error is reported each round as
  ``aggregation_error``. It needs each client's own factors.
- Server: the merge, 2 m n (K - 1) r operations; a cut residual costs two QRs and a small SVD,
  O((m + n) (K r)^2 + (K r)^3), and a merge of 2 m n residual_rank.
- Source: Singhal et al., *FedEx-LoRA: exact aggregation for federated and efficient fine-tuning of
  large language models*, ACL 2025, arXiv 2410.09432.
- Departures: none known; the weights p_k are the run's in both sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.lowrank import Product, balanced_factors, stack_products
from fedraclora.method import Traits
from strategies.shared.factored import Conclusion, Factored
from strategies.shared.replies import Replies


@dataclass(frozen=True)
class FedExLora(Factored):
    """Hyperparameters of FedEx-LoRA.

    Attributes:
        rank: r; a fraction (0, 1] of the drawn side's dimension if written with a dot.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        rslora: Scale s = alpha / sqrt(r) instead.
        initial: How the drawn factor begins, a key of `fedraclora.sketch.SKETCHES`; or how both do,
            one of `strategies.shared.initials.STARTS`.
        side: ``right`` (A begins as a drawing, B at zero), ``left`` (the other way round), ``auto``
            (the larger factor is drawn).
        cap: Cut the rank at the drawn side's dimension, with a note; False refuses it.
        residual_rank: Components of the residual that are merged; None: all.
    """

    continues: ClassVar[bool] = True
    residual_rank: int | None = None

    @override
    def __post_init__(self) -> None:
        """Refuse impossible hyperparameters."""
        super().__post_init__()
        if self.residual_rank is not None and self.residual_rank < 1:
            raise ConfigError(
                f"method.residual_rank is {self.residual_rank}; 1 or more, or null, is wanted"
            )

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=self.residual_rank is None, linear=False, merges=True)

    @override
    def conclude(self, replies: Replies) -> Conclusion:
        rest: Product | None = residual(replies)
        if rest is not None and self.residual_rank is not None:
            rest = balanced_factors(*rest, min(self.residual_rank, rest[0].shape[1]))
        return Conclusion(carried=replies.mean, merged=rest)


def residual(replies: Replies) -> Product | None:
    """What separate averages miss, ``sum_k p_k B_k A_k - B_bar A_bar``; None for one client."""
    last = len(replies.p) - 1
    if not last:
        return None
    gap = replies.B[:last] - replies.mean[0]
    return stack_products(gap, replies.A[:last] - replies.A[last], replies.p[:last])
