"""FedSA-LoRA: both factors trained, A averaged, B kept by each client.

    client k: (B_k, A_k) from (its own B_k, A), local steps on both;   A <- sum_k p_k A_k
    effective weight of client k: W + s B_k A

- Uplink: r n numbers per matrix and client. Downlink: a seed in the first round, then r n.
- Aggregation: the mean of A is exact and linear. There is no global model: a client's weights are
  its own, and the server's, W, are those of a client that has not trained yet (B = 0).
- Client state: B_k, r m numbers per matrix, from round to round.
- Server: one mean, K r n operations.
- Source: Guo et al., *Selective aggregation for low-rank adaptation in federated learning*, ICLR
  2025, arXiv 2410.01463.
- Departures: the head follows the run's policy, where the public code keeps it at the client
  (``head=local``).
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.aggregate import Uplinks
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
    apply_link,
)
from fedraclora.tree import Tree
from strategies.shared.common import closed, dense_floats, dense_means, dense_slots
from strategies.shared.drawn import Drawn


@dataclass(frozen=True)
class FedSaLora(Drawn):
    """Hyperparameters of FedSA-LoRA.

    Attributes:
        rank: r; a fraction (0, 1] of n if written with a dot.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        rslora: Scale s = alpha / sqrt(r) instead.
        initial: How A begins, a key of `fedraclora.sketch.SKETCHES`; B begins at zero.
        cap: Cut the rank at n, with a note; False refuses it.
    """

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=True, linear=True, merges=False, client_state=True)

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        del round_, cohort
        adapters = {}
        for name, view in state.plan.targets.items():
            rank, (m, n) = self.rank_of(state.plan, name), view.shape
            start = state.carried.get(f"{name}/A", self.sketch(state.plan, name, draw))
            factors = {"B": Trained((m, rank), upload=False), "A": Trained((rank, n), start)}
            adapters[name] = Adapter(dict(factors), self.scale_of(state.plan, name))
        return Downlink(adapters, dense_slots(state), link=state.memo["sketch"])

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        mean = got.mean()
        carried = {f"{n}/A": mean[f"{n}/A"].to(state.base[n].dtype) for n in sent.adapters}
        link = Link({}, dense_means(state, mean))
        return closed(state, link, carried=carried, ends=False)

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        terms = {}
        for name in state.plan.targets:
            B = (own or {}).get(f"{name}/B")
            if B is not None:
                A = state.carried.get(f"{name}/A", self.sketch(state.plan, name, draw))
                terms[name] = Term((B, A), self.scale_of(state.plan, name))
        return apply_link(state.base, Link(terms), state.plan)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        _, A = self.numbers(plan)
        return A + dense_floats(plan), A if round_ > 1 else 0
