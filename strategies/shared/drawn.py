"""Methods one of whose factors begins as a drawing that is not drawn again."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.protocol.method import Plan
from fedraclora.protocol.plan import Rank
from fedraclora.sketch import SketchSpec
from fedraclora.strategies.shared.common import drawn_rank
from fedraclora.strategies.shared.initials import check_start
from fedraclora.strategies.shared.layerwise import Layer, LayerMethod, Round


@dataclass(frozen=True)
class Drawn(LayerMethod):
    """Hyperparameters that all of them have, beside those of `LowRank`.

    The rank is bounded by the drawn side: n where A is drawn.

    Attributes:
        initial: How the drawn factor begins, a key of `fedraclora.sketch.SKETCHES`.
    """

    initial: str = "kaiming_uniform"

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        self.check_initial()

    def check_initial(self) -> None:
        """Reject an `initial` that does not exist, or does not fit."""
        check_start(self.initial, fits=False, why=f"{type(self).__name__} has none such")

    @override
    def layer_rank(self, plan: Plan, name: str) -> Rank:
        return drawn_rank(self.rank, "right", plan, name, cap=self.cap)

    def first(self, layer: Layer, now: Round, label: str = "A", index: int = 0) -> SketchSpec:
        """Draw a factor as it begins; another ``index`` is another drawing."""
        return now.sketch(layer, label, self.initial, index=index)
