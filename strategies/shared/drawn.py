"""What methods with a rank and a scale have in common, and those whose factors are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.adapter import (
    Rank,
    Ranks,
    check_patterns,
    check_rank,
    resolve_rank,
    resolve_scale,
)
from fedraclora.method import Draw, Method, Plan, State
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree
from strategies.shared.common import FIRST_LINK, drawn_rank
from strategies.shared.initials import check_start


@dataclass(frozen=True)
class Ranked(Method):
    """Hyperparameters that all of them have.

    Attributes:
        rank: r; a fraction (0, 1] of the smaller side if written with a dot; or these by layer
            (`fedraclora.adapter.own_rank`).
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        rslora: Scale s = alpha / sqrt(r) instead.
        cap: Cut the rank at the smaller side, with a note; False refuses it.
    """

    rank: Ranks = 8
    alpha: float | str = "auto"
    rslora: bool = False
    cap: bool = True

    def __post_init__(self) -> None:
        """Refuse impossible hyperparameters."""
        check_rank(self.rank)
        resolve_scale(self.alpha, 1, rslora=self.rslora)

    @override
    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        del draw
        check_patterns(self.rank, plan.targets)
        notes = tuple(n for w in plan.targets if (n := self.layer_rank(plan, w).note) is not None)
        return State(base, plan, memo=dict(FIRST_LINK), notes=notes)

    def layer_rank(self, plan: Plan, name: str) -> Rank:
        """Give the rank of one layer, and a note where it is not the one that was asked for."""
        return resolve_rank(self.rank, min(plan.targets[name].shape), name, cap=self.cap)

    def rank_of(self, plan: Plan, name: str) -> int:
        """Give the rank of one layer."""
        return self.layer_rank(plan, name).value

    def scale_of(self, plan: Plan, name: str) -> float:
        """Give the scale s of one layer."""
        return resolve_scale(self.alpha, self.rank_of(plan, name), rslora=self.rslora)

    def ranks_and_scales(self, plan: Plan) -> tuple[dict[str, int], dict[str, float]]:
        """Give r and s of every layer, by weight."""
        ranks = {name: self.rank_of(plan, name) for name in plan.targets}
        return ranks, {name: self.scale_of(plan, name) for name in ranks}

    def numbers(self, plan: Plan) -> tuple[int, int]:
        """Count the numbers of all B (r m each) and of all A (r n each)."""
        ranks, _ = self.ranks_and_scales(plan)
        B, A = (sum(r * plan.targets[n].shape[side] for n, r in ranks.items()) for side in (0, 1))
        return B, A


@dataclass(frozen=True)
class Drawn(Ranked):
    """Hyperparameters of those whose factors begin as drawings, beside those of `Ranked`.

    The rank is bounded by the drawn side: n where A is drawn.

    Attributes:
        initial: How the drawn factor begins, a key of `fedraclora.sketch.SKETCHES`.
    """

    initial: str = "kaiming_uniform"

    @override
    def __post_init__(self) -> None:
        """Refuse impossible hyperparameters."""
        super().__post_init__()
        self.check_initial()

    def check_initial(self) -> None:
        """Refuse an `initial` that does not exist, or does not fit."""
        check_start(self.initial, fits=False, why=f"{type(self).__name__} has none such")

    @override
    def layer_rank(self, plan: Plan, name: str) -> Rank:
        return drawn_rank(self.rank, "right", plan, name, cap=self.cap)

    def sketch(
        self, plan: Plan, name: str, draw: Draw, *, index: int = 0, right: bool = True
    ) -> SketchSpec:
        """Give the drawing with which A of one layer begins (B, where ``right`` is False)."""
        return SketchSpec(
            kind=self.initial,
            side="right" if right else "left",
            rank=self.rank_of(plan, name),
            dim=plan.targets[name].shape[1 if right else 0],
            seed=draw.sketch_seed(name),
            index=index,
            normalise="none",
        )
