"""GaLore at the clients, full weights averaged: gradients are projected, nothing else is changed.

    client k: every ``gap`` local steps P_k = the r leading singular vectors of its gradient, on the
    smaller side;  local steps on W_k along P_k P_k^T G (m <= n), or G P_k P_k^T (m > n)
    W <- sum_k p_k W_k

- Uplink: m n numbers per matrix. Downlink: what the client missed, at most m n.
- Aggregation: exact and linear: it is FedAvg's.
- Server: one mean, K m n operations.
- Source: Mahla, Jadhav and Ramakrishnan, *Why gradient subspace? Identifying and mitigating LoRA's
  bottlenecks in federated fine-tuning of large language models*, arXiv 2410.23111; GaLore: Zhao et
  al., ICML 2024, arXiv 2403.03507.
- Departures: moments have the full shape. Under SGD with momentum that is the same while P_k stays;
  under AdamW it is not GaLore, whose moments are those of the projected gradient: use SGD. GaLore's
  memory is so not saved here. Its constant scale is in the step size.
- Unverified: the abstract and summaries of the federated paper were read: its interval and rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from typing_extensions import override

from fedraclora.limits import Count, Limited
from fedraclora.protocol.method import Cohort, Downlink, Draw, State
from fedraclora.protocol.plan import resolve_rank
from strategies.fedavg import FedAvg
from strategies.shared.common import turned


@dataclass(frozen=True)
class GaloreAverage(Limited, FedAvg, group="method"):
    """Hyperparameters of GaLore with direct averaging.

    Attributes:
        rank: r; a fraction (0, 1] of the smaller side if written with a dot. Above the smaller side
            nothing is projected.
        gap: Local steps that a projection serves; it is taken anew in each round.
    """

    rank: int | float = 8
    gap: Count = 200

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        resolve_rank(self.rank, 1, "any layer", cap=True)

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        ranks = {
            f"rank/{name}": resolve_rank(self.rank, min(view.shape), name, cap=True).value
            for name, view in state.plan.targets.items()
        }
        sent = super().open_round(state, round_, cohort, draw)
        return replace(
            sent, recipe="galore", arguments={"gap": self.gap, **ranks, **turned(state.plan)}
        )
