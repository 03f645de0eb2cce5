"""Methods that train one factor of every adapter under a drawing of the other."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.adapter import Rank
from fedraclora.errors import ConfigError
from fedraclora.method import Adapter, Draw, Plan, Sketched, State, Trained
from fedraclora.sketch import SketchSpec, check_sketch
from fedraclora.tree import Tree
from strategies.shared.common import drawn_rank, draws_right, in_force
from strategies.shared.drawn import Ranked


@dataclass(frozen=True)
class Asymmetric(Ranked):
    """Hyperparameters that all of them have, beside those of `Ranked`.

    The rank is bounded by a part of the drawn side: n / G where A is drawn.

    Attributes:
        sketch: A key of `fedraclora.sketch.SKETCHES`.
        normalise: ``rows``, ``identity`` (of each part) or ``none`` (`fedraclora.sketch`).
        sketches: G, equal parts of one drawing, of the rank each.
    """

    sketch: str = "orthonormal"
    normalise: str = "rows"
    sketches: int = 1

    @override
    def __post_init__(self) -> None:
        """Refuse impossible hyperparameters."""
        super().__post_init__()
        check_sketch(self.sketch, self.normalise, "independent")
        if self.sketches < 1:
            raise ConfigError(f"method.sketches is {self.sketches}; 1 or more is wanted")

    def drawn_side(self) -> str:
        """Say which factor is drawn: ``right`` (A), ``left`` (B) or ``auto`` (the larger one)."""
        return "right"

    @override
    def layer_rank(self, plan: Plan, name: str) -> Rank:
        side, parts = self.drawn_side(), self.sketches
        return drawn_rank(self.rank, side, plan, name, cap=self.cap, parts=parts)

    @override
    def scale_of(self, plan: Plan, name: str) -> float:
        # E[A^T A] = I is that of all rows together, and each part has a G-th of it.
        parts = self.sketches**0.5 if self.normalise == "identity" else 1.0
        return super().scale_of(plan, name) * parts

    def spec(self, state: State, name: str, draw: Draw) -> SketchSpec:
        """Give the drawing of one layer that is in force in ``state``, with all its parts."""
        right = draws_right(self.drawn_side(), state.plan, name)
        return SketchSpec(
            kind=self.sketch,
            side="right" if right else "left",
            rank=self.rank_of(state.plan, name) * self.sketches,
            dim=state.plan.targets[name].shape[1 if right else 0],
            seed=draw.sketch_seed(name),
            index=state.memo["sketch"],
            normalise=self.normalise,
        )

    def adapters(self, state: State, draw: Draw) -> dict[str, Adapter]:
        """Give the adapters in force; what is trained starts as it is carried, or at zero."""
        adapters = {}
        for name, view in state.plan.targets.items():
            spec, (m, n) = self.spec(state, name, draw), view.shape
            drawn, scale = Sketched(spec), self.scale_of(state.plan, name)
            if spec.side == "right":
                B = Trained((m, spec.rank), state.carried.get(f"{name}/B"))
                adapters[name] = Adapter({"B": B, "A": drawn}, scale)
            else:
                A = Trained((spec.rank, n), state.carried.get(f"{name}/A"))
                adapters[name] = Adapter({"B": drawn, "A": A}, scale)
        return adapters

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        del own
        return in_force(state, self.adapters(state, draw))

    def trained_numbers(self, plan: Plan) -> int:
        """Count the numbers of all trained factors under one part of their drawings."""
        sides = {n: 0 if draws_right(self.drawn_side(), plan, n) else 1 for n in plan.targets}
        return sum(self.rank_of(plan, n) * plan.targets[n].shape[k] for n, k in sides.items())
