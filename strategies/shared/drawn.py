"""Methods one of whose factors is a drawing: for as long as a link lives, or only at first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from typing_extensions import override

from fedraclora.limits import Count, choice_of
from fedraclora.sketch import Normalise, Sketch, SketchSpec, check_sketch
from fedraclora.strategies.shared.initials import check_start
from fedraclora.strategies.shared.layerwise import Layer, LayerMethod, Round

# What is drawn: A (right), B (left), or the larger factor.
Side = Annotated[str, choice_of(("right", "left", "auto"))]


@dataclass(frozen=True)
class Asymmetric(LayerMethod):
    """Hyperparameters that all of them have, beside those of `LowRankMethod`.

    The rank is bounded by a part of the drawn side: n / G where A is drawn.

    Attributes:
        sketch: A key of `fedraclora.sketch.SKETCHES`.
        normalise: ``rows``, ``identity`` (of each part) or ``none`` (`fedraclora.sketch`).
        sketches: G, equal parts of one drawing, of the rank each.
    """

    draws = "right"
    parts_are = "sketches (method.sketches, times method.pool where there is one)"

    sketch: Sketch = "orthonormal"
    normalise: Normalise = "rows"
    sketches: Count = 1

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        check_sketch(self.sketch, self.normalise, getattr(self, "blocks", "independent"))

    def sides(self, shape: tuple[int, int]) -> tuple[str, str]:
        """Return the labels of the factor that is drawn and of the one that is trained."""
        return ("A", "B") if self.drawn(shape) == "A" else ("B", "A")

    @property
    @override
    def parts(self) -> int:
        return self.sketches

    @override
    def scale_of(self, rank: int) -> float:
        # E[A^T A] = I is that of all rows together, and each part has a G-th of it.
        parts = self.sketches**0.5 if self.normalise == "identity" else 1.0
        return super().scale_of(rank) * parts


@dataclass(frozen=True)
class Drawn(LayerMethod):
    """Hyperparameters that all of them have, beside those of `LowRankMethod`.

    The rank is bounded by the drawn side: n where A is drawn.

    Attributes:
        initial: How the drawn factor begins, a key of `fedraclora.sketch.SKETCHES`.
    """

    draws: ClassVar[str | None] = "right"

    initial: str = "kaiming_uniform"

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        self.check_initial()

    def check_initial(self) -> None:
        """Reject an `initial` that does not exist, or does not fit."""
        check_start(self.initial, fits=False, why=f"{type(self).__name__} has none such")

    def first(self, layer: Layer, now: Round, label: str = "A", index: int = 0) -> SketchSpec:
        """Draw a factor as it begins; another ``index`` is another drawing."""
        return now.sketch(layer, label, self.initial, index=index)
