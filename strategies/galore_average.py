"""GaLore at the clients, full weights averaged: moments live in a subspace of the gradients.

    client k: every ``gap`` local steps P_k = the r leading singular vectors of its gradient G, on
    the smaller side;  R = P_k^T G (m <= n), or G P_k (m > n);  D = the optimiser's step for R
    W_k <- W_k + scale P_k D,  or W_k + scale D P_k^T;   W <- sum_k p_k W_k

- Uplink: m n numbers per matrix. Downlink: what the client missed, at most m n.
- Aggregation: exact and linear: it is FedAvg's.
- Client: moments of r max(m, n) numbers per matrix each, where FedAvg's have m n, and r min(m, n)
  of P_k. They begin anew in each round, with the count of steps and P_k, unless ``local.moments``
  is ``link`` or ``run`` (the same here: no link ends): then a client that returns goes on with its
  own, and ``gap`` counts its steps over all rounds. Plain SGD has no moments: P_k is taken anew in
  each round.
- Server: one mean, K m n operations.
- Source: Mahla, Jadhav and Ramakrishnan, *Why gradient subspace? Identifying and mitigating LoRA's
  bottlenecks in federated fine-tuning of large language models*, arXiv 2410.23111; GaLore: Zhao et
  al., ICML 2024, arXiv 2403.03507.
- Departures: those of `fedraclora.training.moments` from GaLore's code: Adam's eps and decay are
  torch's, square matrices are projected from the left (there from the right), directions that the
  gradient has not are left out, P's signs are fixed. ``scale`` is 1, where GaLore pretrains with
  0.25.
- Unverified: the abstract and summaries of the federated paper were read: its interval, its rank
  and whether its clients' moments outlive a round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from typing_extensions import override

from fedraclora.limits import Count, Limited, Positive
from fedraclora.protocol.method import Cohort, Downlink, Draw, Plan, State
from fedraclora.protocol.plan import Rank, rank_notes, resolve_rank
from fedraclora.strategies.fedavg import FedAvg
from fedraclora.strategies.shared.common import turned
from fedraclora.tree import Tree


@dataclass(frozen=True)
class GaloreAverage(Limited, FedAvg, group="method"):
    """GaLore at the clients, full weights averaged.

    Attributes:
        rank: r; a fraction (0, 1] of the smaller side if written with a dot. From the smaller side
            on gradients are turned, and no shorter.
        gap: Local steps that a projection serves, counted as long as a client's moments live.
        scale: Of what is projected back (the paper's alpha); weight decay is not scaled.
    """

    rank: int | float = 8
    gap: Count = 200
    scale: Positive = 1.0

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        resolve_rank(self.rank, 1, "any layer", cap=True)

    @override
    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        notes = rank_notes(self.layer_rank(plan, name) for name in plan.targets)
        return State(base, plan, notes=notes)

    def layer_rank(self, plan: Plan, name: str) -> Rank:
        """Compute the rank of one layer, and a note where it is not the one that was asked for."""
        return resolve_rank(self.rank, min(plan.targets[name].shape), name, cap=True)

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        ranks = {
            f"rank/{name}": self.layer_rank(state.plan, name).value for name in state.plan.targets
        }
        sent = super().open_round(state, round_, cohort, draw)
        arguments = {"gap": self.gap, "scale": self.scale, **ranks, **turned(state.plan)}
        return replace(sent, recipe="galore", arguments=arguments)
