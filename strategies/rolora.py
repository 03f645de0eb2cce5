"""RoLoRA: B and A trained in turn, each under the mean of the other.

    odd rounds:  client k: local steps on B_k from B under A;   B <- sum_k p_k B_k
    even rounds: client k: local steps on A_k from A under B;   A <- sum_k p_k A_k
    effective weight W + s B A, with B = 0 and A drawn at the start

- Uplink: r m numbers per matrix and client in odd rounds, r n in even ones. Downlink: a seed in the
  first round, r m numbers in the second, then r (m + n): the factor that is trained and the one
  that is not. A client that was there the round before would need the new factor alone.
- Aggregation: exact and linear, since the factor that is not averaged is the same everywhere.
- Rank budgets: client k trains the first r_k components; the others stay as they are.
- Server: one mean, K r m or K r n operations.
- Source: Chen et al., *Robust federated finetuning of LLMs via alternating optimization of LoRA*,
  NeurIPS 2025, arXiv 2502.01755 (earlier 2409.02346). Not the RoLoRA of quantisation.
- Departures: none known.
- Unverified: the official code was not read: how A is drawn, and the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.aggregate import Uplinks
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
    Term,
    Trained,
    Traits,
    apply_link,
)
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree
from strategies.shared.common import closed, dense_floats, dense_means, dense_slots, mean_factors
from strategies.shared.drawn import Drawn


@dataclass(frozen=True)
class RoLora(Drawn):
    """Hyperparameters of RoLoRA.

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
        return Traits(exact=True, linear=True, merges=False, ranks=True, varies=True)

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        adapters = {}
        for name, view in state.plan.targets.items():
            rank, (m, n) = self.rank_of(state.plan, name), view.shape
            B, A = self._factors(state, name, draw)
            frozen: Factor
            if round_ % 2:
                frozen = Sketched(A) if isinstance(A, SketchSpec) else Frozen(A)
                factors: dict[str, Factor] = {"B": Trained((m, rank), B), "A": frozen}
            else:
                frozen = Frozen(torch.zeros(m, rank) if B is None else B)
                factors = {"B": frozen, "A": Trained((rank, n), A)}
            adapters[name] = Adapter(factors, self.scale_of(state.plan, name))
        return Downlink(adapters, dense_slots(state), ranks=cohort.ranks, link=state.memo["sketch"])

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        mean = got.mean()
        trained = mean_factors(state, sent, mean)
        link = Link({}, dense_means(state, mean))
        return closed(state, link, carried=state.carried | trained)

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        del own
        terms = {}
        for name in state.plan.targets:
            B, A = self._factors(state, name, draw)
            if B is not None:
                terms[name] = Term((B, A), self.scale_of(state.plan, name))
        return apply_link(state.base, Link(terms), state.plan)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        B, A = self.numbers(plan)
        up = (B if round_ % 2 else A) + dense_floats(plan)
        return up, {1: 0, 2: B}.get(round_, B + A)

    def _factors(
        self, state: State, name: str, draw: Draw
    ) -> tuple[torch.Tensor | None, torch.Tensor | SketchSpec]:
        """Give B (None: zero) and A of one layer, as they stand."""
        A = state.carried.get(f"{name}/A", self.sketch(state.plan, name, draw))
        return state.carried.get(f"{name}/B"), A
