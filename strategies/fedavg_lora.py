"""FedAvg-LoRA (FedIT): both factors trained, A and B averaged separately.

    client k: (B_k, A_k) from (B_bar, A_bar), local steps on both
    B_bar <- sum_k p_k B_k;   A_bar <- sum_k p_k A_k;   effective weight W + s B_bar A_bar

- Uplink and downlink: r (m + n) numbers per matrix and client. Nothing is merged.
- Aggregation: **not exact**. The mean of the clients' weights is W + s sum_k p_k B_k A_k; what is
  missed is s sum_k p_k (B_k - B_bar)(A_k - A_bar). Its norm, relative to that of the mean change
  of the round, is reported each round as ``aggregation_error``.
- Source: Zhang et al., *Towards building the federated GPT: federated instruction tuning*,
  ICASSP 2024, arXiv 2305.05644; LoRA: Hu et al., ICLR 2022, arXiv 2106.09685.
- Departures: none known; A starts kaiming-uniform and B at zero, as in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from typing_extensions import override

from fedraclora.adapter import resolve_rank, resolve_scale
from fedraclora.aggregate import Uplinks
from fedraclora.lowrank import product_norm, stack_products
from fedraclora.method import (
    Adapter,
    Cohort,
    Downlink,
    Draw,
    Link,
    Method,
    Plan,
    State,
    Term,
    Trained,
    Traits,
    apply_link,
)
from fedraclora.sketch import SketchSpec, check_sketch
from fedraclora.tree import Tree
from strategies.common import dense_floats, dense_means, dense_slots


@dataclass(frozen=True)
class FedAvgLora(Method):
    """Hyperparameters of FedAvg-LoRA.

    Attributes:
        rank: r; a fraction (0, 1] of the input dimension if written with a dot.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        initial: How A is drawn once, a key of `fedraclora.sketch.SKETCHES`; B starts at zero.
        cap: Cut the rank at the input dimension, with a note; False refuses it.
    """

    rank: int | float = 8
    alpha: float | str = "auto"
    initial: str = "kaiming_uniform"
    cap: bool = True

    def __post_init__(self) -> None:
        """Refuse impossible hyperparameters."""
        check_sketch(self.initial, "none", "independent")
        resolve_rank(self.rank, 1, "any layer", cap=True)
        resolve_scale(self.alpha, 1)

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=False, linear=True, merges=False, looks_at_clients=True)

    @override
    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        carried: Tree = {}
        notes = []
        for name, view in plan.targets.items():
            m, n = view.shape
            rank = resolve_rank(self.rank, n, name, cap=self.cap)
            seed = draw.sketch_seed(name)
            spec = SketchSpec(self.initial, "right", rank.value, n, seed, 0, normalise="none")
            carried[f"{name}/B"] = torch.zeros(m, rank.value, dtype=base[name].dtype)
            carried[f"{name}/A"] = spec.draw().to(base[name].dtype)
            notes += [rank.note] if rank.note else []
        return State(base, plan, carried, notes=tuple(notes))

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        del round_, cohort, draw
        adapters = {}
        for name in state.plan.targets:
            pair = {label: state.carried[f"{name}/{label}"] for label in ("B", "A")}
            factors = {label: Trained(tuple(t.shape), t) for label, t in pair.items()}
            adapters[name] = Adapter(dict(factors), self._scale(state, name))
        return Downlink(adapters, dense_slots(state))

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        mean = got.mean()
        carried = {n: mean[n].to(old.dtype) for n, old in state.carried.items()}
        link = Link(dense=dense_means(state, mean))
        base = apply_link(state.base, link, state.plan)
        report = self._aggregation_error(state, mean, got) if got.has_individuals else {}
        return replace(state, base=base, carried=carried, link=link, report=report, notes=())

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        del draw, own
        terms = {
            name: Term(
                (state.carried[f"{name}/B"], state.carried[f"{name}/A"]), self._scale(state, name)
            )
            for name in state.plan.targets
        }
        return apply_link(state.base, Link(terms), state.plan)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        del round_
        factors = 0
        for name, view in plan.targets.items():
            m, n = view.shape
            factors += resolve_rank(self.rank, n, name, cap=self.cap).value * (m + n)
        return factors + dense_floats(plan), factors

    def _scale(self, state: State, name: str) -> float:
        return resolve_scale(self.alpha, state.carried[f"{name}/B"].shape[1])

    def _aggregation_error(self, state: State, mean: Tree, got: Uplinks) -> dict[str, float]:
        """Norm of what separate averaging misses, relative to the mean change of the round."""
        stack = got.stack()
        p = got.weights / got.total
        missed = change = 0.0
        for name in state.plan.targets:
            B, A = (stack[f"{name}/{label}"].to(torch.float64) for label in ("B", "A"))
            scale = self._scale(state, name)
            gap = stack_products(B - mean[f"{name}/B"], A - mean[f"{name}/A"], p)
            missed += (scale * product_norm(*gap)) ** 2
            left, right = stack_products(B, A, p)
            start = (state.carried[f"{name}/{label}"].to(torch.float64) for label in ("B", "A"))
            B0, A0 = start
            left, right = torch.cat([left, -B0], dim=1), torch.cat([right, A0])
            change += (scale * product_norm(left, right)) ** 2
        return {"aggregation_error": (missed / change) ** 0.5 if change else 0.0}
