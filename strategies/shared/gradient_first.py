"""Methods whose first frozen factor may be taken from the gradient (``method.first=gradient``).

    round 1:  nothing is trained; G ~ Q Z, the mean gradient of the clients' local batches
    link 0:   A = the leading right singular vectors of Q Z (left links: B = the left ones)

Later links are as they were. The probe is that of LoRA-GA (`strategies.shared.initials`): with q =
min(4 r, m, n), q (m + n) numbers up and q m and a seed down per matrix and client, and in link 0
the factor goes down in each round, where a drawing costs a seed. The server needs sums alone.

- Source of the choice: Wang, Yu and Li, *LoRA-GA*, NeurIPS 2024, arXiv 2407.05000, for factors that
  are both trained; Ponkshe et al., *LoRA-SB*, arXiv 2411.19557, for frozen ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Annotated

import torch
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.limits import choice_of
from fedraclora.lowrank.algebra import Product
from fedraclora.protocol.factor import as_rows, label_of
from fedraclora.protocol.method import Cohort, Downlink, Draw, Link, Plan, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.sketch import SketchSpec
from fedraclora.strategies.shared import initials, past
from fedraclora.strategies.shared.common import closed
from fedraclora.strategies.shared.layerwise import Layer, LayerMethod
from fedraclora.tree import Tree

FIRST = ("drawn", "gradient")


@dataclass(frozen=True, kw_only=True)
class GradientFirst(LayerMethod):
    """Hyperparameters of them, beside those of `LowRankMethod`.

    Attributes:
        first: Where the frozen factor of the first link comes from: ``drawn``, or ``gradient``.
    """

    first: Annotated[str, choice_of(FIRST)] = "drawn"

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        if self.probe_rounds and self.traits.pools:
            raise ConfigError(
                "method.first is gradient, but the sketches of a pool recur by their seeds; leave "
                "it at drawn, or take method=fed_rac_lora"
            )

    def first_factor(self, layer: Layer, gradient: Product) -> Tree:
        """Compute what is carried into the first link, by label.

        Args:
            layer: The layer.
            gradient: Of its weight, as a product [m, q] [q, n].
        """
        raise NotImplementedError

    @property
    def probe_rounds(self) -> int:
        """Count the rounds before the first link."""
        return int(self.first == "gradient")

    def probes(self, state: State) -> bool:
        """Return whether the next round asks for gradients."""
        begun = state.memo.sketch or state.memo.age or state.carried
        return self.first == "gradient" and not begun

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        if not self.probes(state):
            return super().open_round(state, round_, cohort, draw)
        ranks, _ = self.ranks_and_scales(state.plan)
        return initials.first_probe(state.plan, ranks, draw, purpose="/probe")

    @override
    def next_exchange(self, state: State, sent: Downlink, got: Uplinks) -> Downlink | None:
        return initials.second_probe(sent, got) if self.probes(state) else None

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        if not self.probes(state):
            return super().close_round(state, sent, got)
        mean, carried = got.mean(), Tree()
        for layer in self.layers_of(state):
            Q = sent.adapters[layer.name].factors["B"].draw().to("cpu", torch.float64)
            found = self.first_factor(layer, (Q, mean[f"{layer.name}/A"].to("cpu")))
            carried |= {f"{layer.name}/{k}": t.to(layer.dtype) for k, t in found.items()}
        return replace(closed(state, Link(), carried=carried), memo=state.memo)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        if not self.probe_rounds:
            return super().floats(plan, round_)
        if round_ == 1:
            return initials.probe_floats(plan, self.ranks_and_scales(plan)[0])
        drawn = replace(self, first="drawn")
        up, down = LayerMethod.floats(drawn, plan, round_ - 1)
        if self.link_rounds is None or round_ - 1 <= self.link_rounds:
            adapters = (drawn.asked(plan, name, 1) for name in plan.targets)
            frozen = (f for adapter in adapters for f in adapter.factors.values() if f.drawing)
            down += sum(prod(f.shape) for f in frozen)
        return up, down


def full_factor(factor: torch.Tensor, drawing: SketchSpec) -> torch.Tensor:
    """Complete a first factor by rows of a drawing, where the gradient has given fewer.

    It has no more directions than its weight has rows or columns.

    Args:
        factor: A [k, n], or B [m, k], whose components have the drawing's length. Not modified.
        drawing: Of rank k or more.
    """
    label = label_of(drawing)
    rows, length = as_rows(factor, label), drawing.gram_scale**0.5
    if len(rows) == drawing.rank:
        return factor
    drawn = as_rows(drawing.draw(), label)
    rows = past.completed(rows.to("cpu", torch.float64) / length, drawn) * length
    return as_rows(rows, label).to(factor.dtype)
