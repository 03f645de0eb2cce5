"""Fed-SB: a small core is trained between two frozen factors.

    B (m x r) and A (r x n) drawn once;  client k: local steps on R_k (r x r) from R
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

from dataclasses import dataclass, replace

from typing_extensions import override

from fedraclora.adapter import Rank
from fedraclora.aggregate import Uplinks
from fedraclora.method import (
    Adapter,
    Cohort,
    Downlink,
    Draw,
    Factor,
    Plan,
    Sketched,
    State,
    Trained,
    Traits,
)
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree
from strategies.shared.common import close_by_means, dense_floats, dense_slots, in_force
from strategies.shared.drawn import Drawn, Ranked


@dataclass(frozen=True)
class FedSb(Drawn):
    """Hyperparameters of Fed-SB.

    Attributes:
        rank: r; a fraction (0, 1] of the smaller side if written with a dot.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        rslora: Scale s = alpha / sqrt(r) instead.
        initial: How B and A are drawn, a key of `fedraclora.sketch.SKETCHES`.
        cap: Cut the rank at the smaller side, with a note; False refuses it.
    """

    initial: str = "orthonormal"

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=True, linear=True, merges=False)

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        del round_, cohort
        return Downlink(self.adapters(state, draw), dense_slots(state), link=state.memo["sketch"])

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        return close_by_means(state, sent, got.mean(), None)

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        del own
        return in_force(state, self.adapters(state, draw))

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        cores = sum(self.core_rank(plan, name) ** 2 for name in plan.targets)
        return cores + dense_floats(plan), cores if round_ > 1 else 0

    @override
    def layer_rank(self, plan: Plan, name: str) -> Rank:
        return Ranked.layer_rank(self, plan, name)  # both sides are drawn

    def adapters(self, state: State, draw: Draw) -> dict[str, Adapter]:
        """Give the adapters; their cores start as they are carried, or at zero."""
        adapters = {}
        for name in state.plan.targets:
            B, A = self._sketches(state.plan, name, draw)
            core = Trained((B.rank, A.rank), state.carried.get(f"{name}/R"))
            factors: dict[str, Factor] = {"B": Sketched(B), "R": core, "A": Sketched(A)}
            adapters[name] = Adapter(factors, self.scale_of(state.plan, name))
        return adapters

    def core_rank(self, plan: Plan, name: str) -> int:
        """Give the rows of the core of one layer."""
        return self.rank_of(plan, name)

    def _sketches(self, plan: Plan, name: str, draw: Draw) -> tuple[SketchSpec, SketchSpec]:
        """Give the drawings of B and A, which are independent."""
        rank = self.core_rank(plan, name)
        A = replace(self.sketch(plan, name, draw), rank=rank)
        B = self.sketch(plan, name, draw, right=False)
        return replace(B, rank=rank, seed=draw.sketch_seed(f"{name}/B")), A
