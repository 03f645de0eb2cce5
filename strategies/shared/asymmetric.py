"""Methods that train one factor of every adapter under a drawing of the other."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.limits import Count
from fedraclora.protocol.method import Plan
from fedraclora.protocol.plan import Rank
from fedraclora.sketch import Normalise, Sketch, check_sketch
from fedraclora.strategies.shared.common import drawn_rank, draws_right
from fedraclora.strategies.shared.layerwise import LayerMethod


@dataclass(frozen=True)
class Asymmetric(LayerMethod):
    """Hyperparameters that all of them have, beside those of `LowRank`.

    The rank is bounded by a part of the drawn side: n / G where A is drawn.

    Attributes:
        sketch: A key of `fedraclora.sketch.SKETCHES`.
        normalise: ``rows``, ``identity`` (of each part) or ``none`` (`fedraclora.sketch`).
        sketches: G, equal parts of one drawing, of the rank each.
    """

    sketch: Sketch = "orthonormal"
    normalise: Normalise = "rows"
    sketches: Count = 1

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        check_sketch(self.sketch, self.normalise, "independent")

    @property
    def drawn_side(self) -> str:
        """Which factor is drawn: ``right`` (A), ``left`` (B) or ``auto`` (the larger one)."""
        return "right"

    def sides(self, shape: tuple[int, int]) -> tuple[str, str]:
        """Return the labels of the factor that is drawn and of the one that is trained."""
        return ("A", "B") if draws_right(self.drawn_side, shape) else ("B", "A")

    @property
    def parts(self) -> int:
        """How many factors of a layer's rank share the dimension of the drawn side."""
        return self.sketches

    @override
    def layer_rank(self, plan: Plan, name: str) -> Rank:
        side = self.drawn_side
        return drawn_rank(self.rank, side, plan, name, cap=self.cap, parts=self.parts)

    @override
    def scale_of(self, rank: int) -> float:
        # E[A^T A] = I is that of all rows together, and each part has a G-th of it.
        parts = self.sketches**0.5 if self.normalise == "identity" else 1.0
        return super().scale_of(rank) * parts
