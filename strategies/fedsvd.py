"""FedSVD: B trained and averaged, then both factors taken anew from the SVD of their product.

    client k: local steps on B_k from B under A;   B_bar = sum_k p_k B_k
    B_bar A = U S V^T;   B <- U S,  A <- V^T;   effective weight W + s B A

A keeps r orthonormal rows, and they span what they did before: the SVD turns the basis, and no new
direction enters.

- Uplink: r m numbers per matrix and client. Downlink: a seed in the first round, then r (m + n).
- Aggregation: exact and linear: the rank of B_bar A is at most r, so that nothing is cut.
- Server: one mean, then two QRs and an SVD of an r x r matrix, O((m + n) r^2).
- Source: Lee et al., *FedSVD: adaptive orthogonalization for private federated learning with LoRA*,
  NeurIPS 2025, arXiv 2505.12805.
- Departures: the first A is drawn with orthonormal rows; the SVD goes through the factors, where
  the public code forms the m x n product: the same result, but for rows that belong to no singular
  value, which stay in the span of A here and lie anywhere there; the head follows the run's policy,
  where the public code freezes it at random values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.aggregate import Uplinks
from fedraclora.link import matrices
from fedraclora.lowrank import Product, fix_signs
from fedraclora.method import (
    Adapter,
    Cohort,
    Downlink,
    Draw,
    Factor,
    Frozen,
    Link,
    Plan,
    Sketched,
    State,
    Trained,
    Traits,
)
from fedraclora.tree import Tree
from strategies.shared.common import (
    closed,
    dense_floats,
    dense_means,
    dense_slots,
    mean_factors,
    terms_of,
)
from strategies.shared.drawn import Drawn
from strategies.shared.products import with_carried


@dataclass(frozen=True)
class FedSvd(Drawn):
    """Hyperparameters of FedSVD.

    Attributes:
        rank: r; a fraction (0, 1] of n if written with a dot.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        rslora: Scale s = alpha / sqrt(r) instead.
        initial: How A begins, a key of `fedraclora.sketch.SKETCHES`; B begins at zero.
        cap: Cut the rank at n, with a note; False refuses it.
    """

    initial: str = "orthonormal"

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=True, linear=True, merges=False)

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        del round_, cohort
        adapters = {}
        for name, view in state.plan.targets.items():
            A: Factor = Sketched(self.sketch(state.plan, name, draw))
            if f"{name}/A" in state.carried:
                A = Frozen(state.carried[f"{name}/A"])
            shape = (view.shape[0], self.rank_of(state.plan, name))
            B = Trained(shape, state.carried.get(f"{name}/B"))
            adapters[name] = Adapter({"B": B, "A": A}, self.scale_of(state.plan, name))
        return Downlink(adapters, dense_slots(state), link=state.memo["sketch"])

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        mean = got.mean()
        carried: Tree = {}
        terms = terms_of(sent.adapters, mean_factors(state, sent, mean))
        for name, term in terms.items():
            B, A = turned_to_singular_vectors(*matrices(term))
            dtype = state.base[name].dtype
            carried |= {f"{name}/B": B.to(dtype), f"{name}/A": A.to(dtype)}
        link = Link({}, dense_means(state, mean))
        return closed(state, link, carried=carried)

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        del draw, own
        return with_carried(state, self.scale_of)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        B, A = self.numbers(plan)
        return B + dense_floats(plan), A + B if round_ > 1 else 0


def turned_to_singular_vectors(B: torch.Tensor, A: torch.Tensor) -> Product:
    """Give U S, [m, r], and V^T, [r, n] with orthonormal rows, of B A; in float64.

    Where B A has fewer than r singular values (m < r), more rows of A's span make V^T whole.
    """
    ql, rl = torch.linalg.qr(B.to(torch.float64))
    qr, rr = torch.linalg.qr(A.to(torch.float64).mT)
    u, s, vt = torch.linalg.svd(rl @ rr.mT, full_matrices=True)
    left, right = fix_signs(ql @ u, vt[: len(s)] @ qr.mT)
    more, _ = fix_signs(qr @ vt[len(s) :].mT, vt[len(s) :])
    zeros = left.new_zeros(len(left), more.shape[1])
    return torch.cat([left * s, zeros], dim=1), torch.cat([right, more.mT])
