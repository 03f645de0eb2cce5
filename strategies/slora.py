"""SLoRA: a few rounds of sparse full weights, whose change then begins the factors of FedAvg-LoRA.

    rounds 1..R: client k: local steps on the entries of W that a shared mask of density d keeps
                 W <- sum_k p_k W_k
    after R:     (W - W_0) / s = U S V^T;  B = U_r S_r^(1/2),  A = S_r^(1/2) V_r^T;  W <- W - s B A
    then:        FedAvg-LoRA from (B, A);  effective weight W + s B A

- Uplink: m n numbers per matrix and client in the first stage, the zeros beside the mask included,
  where d m n would do; then r (m + n). Downlink: what the client missed, and r (m + n) in the
  second stage.
- Aggregation: **not exact** in the second stage, as FedAvg-LoRA; the first stage and the change to
  the second are exact. The error of a round is reported as ``aggregation_error``.
- Server: one mean; once, an SVD of each m x n change.
- Source: Babakniya et al., *SLoRA: federated parameter efficient fine-tuning of language models*,
  2023, arXiv 2308.06522.
- Departures: what the rank cuts off the change stays in W, where the paper drops it; S is shared
  between the factors by its root.
- Unverified: how the paper draws its mask: here every entry is kept with probability d, for good.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from typing_extensions import override

from fedraclora.aggregate import Uplinks
from fedraclora.errors import ConfigError
from fedraclora.method import (
    Adapter,
    Cohort,
    Downlink,
    Draw,
    Link,
    Plan,
    State,
    Trained,
    Traits,
)
from fedraclora.tree import Tree
from strategies.shared.common import closed, dense_floats, dense_means, dense_slots, turned
from strategies.shared.drawn import Ranked
from strategies.shared.products import principal, with_carried
from strategies.shared.replies import separate_means_error


@dataclass(frozen=True)
class SLora(Ranked):
    """Hyperparameters of SLoRA.

    Attributes:
        rank: r; a fraction (0, 1] of the smaller side if written with a dot.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        rslora: Scale s = alpha / sqrt(r) instead.
        cap: Cut the rank at the smaller side, with a note; False refuses it.
        sparse_rounds: R, rounds of the first stage.
        density: d, the share of entries that it trains.
    """

    sparse_rounds: int = 5
    density: float = 0.1

    @override
    def __post_init__(self) -> None:
        """Refuse impossible hyperparameters."""
        super().__post_init__()
        if self.sparse_rounds < 1:
            raise ConfigError(f"method.sparse_rounds is {self.sparse_rounds}; 1 or more is wanted")
        if not 0 < self.density <= 1:
            raise ConfigError(f"method.density is {self.density}; it must lie in (0, 1]")

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=False, linear=True, merges=True, looks_at_clients=True, varies=True)

    @override
    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = super().init(base, plan, draw)
        return replace(state, carried={f"{name}/initial": base[name] for name in plan.targets})

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        del round_, cohort
        plan, link = state.plan, state.memo["sketch"]
        if not link:
            full = {name: Trained(plan.shapes[name]) for name in plan.targets}
            seeds = {f"seed/{name}": draw.sketch_seed(name) for name in full}
            arguments = {"density": self.density, **seeds, **turned(plan)}
            return Downlink(dense=full | dense_slots(state), recipe="sparse", arguments=arguments)
        adapters = {}
        for name in plan.targets:
            B, A = (state.carried[f"{name}/{label}"] for label in ("B", "A"))
            factors = {"B": Trained(tuple(B.shape), B), "A": Trained(tuple(A.shape), A)}
            adapters[name] = Adapter(dict(factors), self.scale_of(plan, name))
        return Downlink(adapters, dense_slots(state), link=link)

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        mean, plan = got.mean(), state.plan
        dense = dense_means(state, mean)
        if sent.adapters:
            labels = [f"{name}/{label}" for name in sent.adapters for label in ("B", "A")]
            carried = {n: mean[n].to(state.base[n.rpartition("/")[0]].dtype) for n in labels}
            report = separate_means_error(state, sent, got) if got.has_individuals else {}
            link = Link({}, dense)
            return closed(state, link, carried=carried, ends=False, report=report)
        exact = {"aggregation_error": 0.0}
        carried, ends = dict(state.carried), state.memo["age"] + 1 >= self.sparse_rounds
        for name, view in plan.targets.items():
            old, new = state.base[name], mean[name]
            if ends:
                change = view.matrix(new - carried.pop(f"{name}/initial").to(new))
                rank, scale = self.rank_of(plan, name), self.scale_of(plan, name)
                B, A = (t.to(old.dtype) for t in principal(change, rank, scale))
                carried |= {f"{name}/B": B, f"{name}/A": A}
                new = view.stored(view.matrix(new) - scale * B.double() @ A.double(), old)
            dense[name] = new.to(old.dtype)
        return closed(state, Link({}, dense), carried=carried, ends=ends, report=exact)

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        del draw, own
        return with_carried(state, self.scale_of)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        factors = sum(self.numbers(plan))
        if round_ > self.sparse_rounds:
            return factors + dense_floats(plan), factors
        return sum(prod(plan.shapes[n]) for n in plan.targets) + dense_floats(plan), 0
