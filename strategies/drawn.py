"""Methods with one rank and scale, and factors that begin as a drawing: hyperparameters, start."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.adapter import Rank, resolve_rank, resolve_scale
from fedraclora.method import Draw, Method, Plan, State
from fedraclora.sketch import SketchSpec, check_sketch
from fedraclora.tree import Tree
from strategies.common import FIRST_LINK, drawn_rank


@dataclass(frozen=True)
class Drawn(Method):
    """Hyperparameters that all of them have.

    Attributes:
        rank: r; a fraction (0, 1] of the drawn side's dimension if written with a dot.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        initial: How the drawn factor begins, a key of `fedraclora.sketch.SKETCHES`.
        cap: Cut the rank at the drawn side's dimension, with a note; False refuses it.
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

    @override
    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        del draw
        notes = tuple(n for w in plan.targets if (n := self.layer_rank(plan, w).note) is not None)
        return State(base, plan, memo=dict(FIRST_LINK), notes=notes)

    def layer_rank(self, plan: Plan, name: str) -> Rank:
        """Give the rank of one layer, and a note where it is not the one that was asked for."""
        return drawn_rank(self.rank, "right", plan, name, cap=self.cap)

    def rank_of(self, plan: Plan, name: str) -> int:
        """Give the rank of one layer."""
        return self.layer_rank(plan, name).value

    def scale_of(self, plan: Plan, name: str) -> float:
        """Give the scale s of one layer."""
        return resolve_scale(self.alpha, self.rank_of(plan, name))

    def numbers(self, plan: Plan) -> tuple[int, int]:
        """Count the numbers of all B (r m each) and of all A (r n each)."""
        ranks = {name: self.rank_of(plan, name) for name in plan.targets}
        B, A = (sum(r * plan.targets[n].shape[side] for n, r in ranks.items()) for side in (0, 1))
        return B, A

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
