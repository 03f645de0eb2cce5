"""FedAvg-LoRA (FedIT), and in links COLA and ReLoRA: both factors trained, averaged separately.

    client k: (B_k, A_k) from (B_bar, A_bar), local steps on both
    B_bar <- sum_k p_k B_k;   A_bar <- sum_k p_k A_k;   effective weight W + s B_bar A_bar
    every ``resample_every`` rounds: W <- W + s B_bar A_bar, and both factors begin anew

One factor begins as a drawing and the other at zero, so a new link leaves the weights as they are.
``resample_every = None`` is one link without end: FedAvg-LoRA, and LoRA where there is one client.
Links with one client are COLA; ReLoRA also keeps a share of the optimiser's moments and warms the
step size up anew, which are local settings (``local=relora``).

- Uplink: r (m + n) numbers per matrix and client. Downlink: the same; a seed where a link begins,
  and then what the client missed: r (m + n) numbers per link that was merged, at most m n.
- Aggregation: **not exact**. The mean of the clients' weights is W + s sum_k p_k B_k A_k; what is
  missed is s sum_k p_k (B_k - B_bar)(A_k - A_bar). Its norm, relative to that of the mean change
  of the round, is reported each round as ``aggregation_error``. One client misses nothing.
- Source: Zhang et al., *Towards building the federated GPT: federated instruction tuning*,
  ICASSP 2024, arXiv 2305.05644; LoRA: Hu et al., ICLR 2022, arXiv 2106.09685. COLA: Xia, Qin and
  Hazan, *Chain of LoRA*, 2024, arXiv 2401.04151. ReLoRA: Lialin et al., ICLR 2024, arXiv
  2307.05695.
- Departures: a drawn A starts kaiming-uniform, as in PEFT, and so does a drawn B, by its own m
  (PEFT's rule would take its r). The links of several clients are ours: COLA and ReLoRA have one.
  ReLoRA's training of all weights before the first link is what ``pretrain`` does, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from typing_extensions import override

from fedraclora.adapter import Rank, resolve_rank, resolve_scale
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
from strategies.common import (
    FIRST_LINK,
    check_link,
    dense_floats,
    dense_means,
    dense_slots,
    drawn_rank,
    draws_right,
    next_link,
)


@dataclass(frozen=True)
class FedAvgLora(Method):
    """Hyperparameters of FedAvg-LoRA, COLA and ReLoRA.

    Attributes:
        rank: r; a fraction (0, 1] of the drawn side's dimension if written with a dot.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        initial: How the drawn factor begins, a key of `fedraclora.sketch.SKETCHES`.
        side: ``right`` (A begins as a drawing, B at zero), ``left`` (the other way round), ``auto``
            (the larger factor is drawn).
        resample_every: Rounds of a link, after which it is merged; None = one link for ever.
        cap: Cut the rank at the drawn side's dimension, with a note; False refuses it.
    """

    rank: int | float = 8
    alpha: float | str = "auto"
    initial: str = "kaiming_uniform"
    side: str = "right"
    resample_every: int | None = None
    cap: bool = True

    def __post_init__(self) -> None:
        """Refuse impossible hyperparameters."""
        check_sketch(self.initial, "none", "independent")
        check_link(self.side, self.resample_every)
        resolve_rank(self.rank, 1, "any layer", cap=True)
        resolve_scale(self.alpha, 1)

    @property
    @override
    def traits(self) -> Traits:
        merges = self.resample_every is not None
        return Traits(exact=False, linear=True, merges=merges, looks_at_clients=True)

    @override
    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        del draw
        notes = tuple(note for n in plan.targets if (note := self._rank(plan, n).note) is not None)
        return State(base, plan, memo=dict(FIRST_LINK), notes=notes)

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        del round_, cohort
        adapters = {}
        for name, view in state.plan.targets.items():
            m, n = view.shape
            rank = self._rank(state.plan, name).value
            starts = self._starts(state, name, draw)
            factors = {"B": Trained((m, rank), starts["B"]), "A": Trained((rank, n), starts["A"])}
            adapters[name] = Adapter(dict(factors), resolve_scale(self.alpha, rank))
        return Downlink(adapters, dense_slots(state), link=state.memo["sketch"])

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        mean = got.mean()
        averaged = {n: mean[n].to(state.base[n.rpartition("/")[0]].dtype) for n in _factors(sent)}
        memo = next_link(state.memo, self.resample_every)
        ends = memo["age"] == 0
        link = Link(_terms(sent, averaged) if ends else {}, dense_means(state, mean))
        return replace(
            state,
            base=apply_link(state.base, link, state.plan),
            carried={} if ends else averaged,
            memo=memo,
            link=link,
            report=_aggregation_error(sent, mean, got) if got.has_individuals else {},
            notes=(),
        )

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        del draw, own
        if not state.carried:
            return state.base
        terms = {}
        for name in state.plan.targets:
            B, A = (state.carried[f"{name}/{label}"] for label in ("B", "A"))
            terms[name] = Term((B, A), resolve_scale(self.alpha, B.shape[1]))
        return apply_link(state.base, Link(terms), state.plan)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        factors = sum(self._rank(plan, n).value * sum(v.shape) for n, v in plan.targets.items())
        age = (round_ - 1) % self.resample_every if self.resample_every else round_ - 1
        return factors + dense_floats(plan), factors if age else 0

    def _rank(self, plan: Plan, name: str) -> Rank:
        return drawn_rank(self.rank, self.side, plan, name, cap=self.cap)

    def _starts(
        self, state: State, name: str, draw: Draw
    ) -> dict[str, torch.Tensor | SketchSpec | None]:
        """Give where the factors of a layer start: as they are, or a drawing and zero."""
        if state.carried:
            return {label: state.carried[f"{name}/{label}"] for label in ("B", "A")}
        right = draws_right(self.side, state.plan, name)
        spec = SketchSpec(
            kind=self.initial,
            side="right" if right else "left",
            rank=self._rank(state.plan, name).value,
            dim=state.plan.targets[name].shape[1 if right else 0],
            seed=draw.sketch_seed(name),
            index=state.memo["sketch"],
            normalise="none",
        )
        return {"B": None, "A": spec} if right else {"B": spec, "A": None}


def _factors(sent: Downlink) -> list[str]:
    return [f"{weight}/{label}" for weight in sent.adapters for label in ("B", "A")]


def _terms(sent: Downlink, factors: Tree) -> dict[str, Term]:
    return {
        weight: Term((factors[f"{weight}/B"], factors[f"{weight}/A"]), adapter.scale)
        for weight, adapter in sent.adapters.items()
    }


def _aggregation_error(sent: Downlink, mean: Tree, got: Uplinks) -> dict[str, float]:
    """Norm of what separate averaging misses, relative to the mean change of the round."""
    stack, slots = got.stack(), sent.trained()
    p = got.weights / got.total
    missed = change = 0.0
    for name, adapter in sent.adapters.items():
        labels = (f"{name}/B", f"{name}/A")
        B, A = (stack[label].to(torch.float64) for label in labels)
        gap = stack_products(B - mean[labels[0]], A - mean[labels[1]], p)
        missed += (adapter.scale * product_norm(*gap)) ** 2
        left, right = stack_products(B, A, p)
        B0, A0 = (slots[label].opening() for label in labels)
        if B0 is not None and A0 is not None:  # else the round began at B A = 0
            left = torch.cat([left, -B0.to(torch.float64)], dim=1)
            right = torch.cat([right, A0.to(torch.float64)])
        change += (adapter.scale * product_norm(left, right)) ** 2
    return {"aggregation_error": (missed / change) ** 0.5 if change else 0.0}
