"""FRLoRA: both factors start from the principal part of the initial weights in every round.

    once:     W = U S V^T;  B_0 = U_r (S_r / s)^(1/2),  A_0 = (S_r / s)^(1/2) V_r^T
              W <- W - s B_0 A_0
    client k: (B_k, A_k) from (B_0, A_0), local steps on both;  effective weight W + s B A
    B_bar = sum_k p_k B_k;  A_bar = sum_k p_k A_k;  W <- W + s (B_bar A_bar - B_0 A_0)

- Uplink: r (m + n) numbers per matrix and client. Downlink: the same, also in the first round, and
  what the client missed: 2 r (m + n) numbers per link, at most m n. A client that keeps B_0 and
  A_0 would need half of that. Nobody is charged for W - s B_0 A_0: a client forms it from what the
  first round sends.
- Aggregation: **not exact**: factors are averaged apart, as in FedAvg-LoRA; what is missed is
  reported each round as ``aggregation_error``.
- Server: two means and a merge of 4 m n r operations; an SVD of each matrix before the first round.
- Source: Yan et al., *Federated residual low-rank adaptation of large language models*, ICLR 2025,
  OpenReview e0rQRMUhs7 (no arXiv number was found).
- Departures: the run's aggregation weights, where the public code takes uniform ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.aggregate import Uplinks
from fedraclora.lowrank import minus, sum_products
from fedraclora.method import (
    Adapter,
    Cohort,
    Downlink,
    Draw,
    Link,
    Plan,
    State,
    Term,
    Trained,
    Traits,
)
from fedraclora.tree import Tree
from strategies.shared.common import closed, dense_floats, dense_means, dense_slots
from strategies.shared.drawn import Ranked
from strategies.shared.initials import begin
from strategies.shared.products import with_carried
from strategies.shared.replies import separate_means_error


@dataclass(frozen=True)
class FrLora(Ranked):
    """Hyperparameters of FRLoRA.

    Attributes:
        rank: r; a fraction (0, 1] of the smaller side if written with a dot.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        rslora: Scale s = alpha / sqrt(r) instead.
        cap: Cut the rank at the smaller side, with a note; False refuses it.
    """

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=False, linear=True, merges=True, looks_at_clients=True)

    @override
    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = super().init(base, plan, draw)
        return begin(state, "pissa", *self.ranks_and_scales(plan), draw)

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        del round_, cohort, draw
        adapters = {}
        for name in state.plan.targets:
            B, A = (state.carried[f"{name}/{label}"] for label in ("B", "A"))
            factors = {"B": Trained(tuple(B.shape), B), "A": Trained(tuple(A.shape), A)}
            adapters[name] = Adapter(dict(factors), self.scale_of(state.plan, name))
        return Downlink(adapters, dense_slots(state), link=state.memo["sketch"])

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        mean = got.mean()
        terms = {}
        for name, adapter in sent.adapters.items():
            starts = [sent.trained()[f"{name}/{label}"].opening() for label in ("B", "A")]
            B0, A0 = (start for start in starts if start is not None)
            dtype = state.base[name].dtype
            B, A = (mean[f"{name}/{label}"].to(dtype) for label in ("B", "A"))
            terms[name] = Term(sum_products((B, A), minus((B0, A0))), adapter.scale)
        link = Link(terms, dense_means(state, mean))
        report = separate_means_error(state, sent, got) if got.has_individuals else {}
        return closed(state, link, carried=state.carried, report=report)

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        del draw, own
        return with_carried(state, self.scale_of)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        del round_
        factors = sum(self.numbers(plan))
        return factors + dense_floats(plan), factors
