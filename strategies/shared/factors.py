"""Base classes of methods with one random factor, or with two trained ones.

    client k: (B_k, A_k) from (B_0, A_0), local steps on both;  effective weight W + s B A
    server:   per weight, the start of the next round, and the merge into W

A method defines the second line in its ``update``; the initialization of factors is here. A drawn
factor stays until the next merge, or is only a factor's first value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from typing_extensions import override

from fedraclora.limits import Count, OneOf
from fedraclora.lowrank.algebra import Product
from fedraclora.protocol.instructions import FROM_ZERO, PARTS_OF_WEIGHTS
from fedraclora.protocol.method import Cohort, Draw, Factor, Plan, RoundInstructions, State, Traits
from fedraclora.protocol.plan import Rank
from fedraclora.protocol.rank_budgets import within
from fedraclora.sketch import Normalize, Sketch, SketchSpec, check_sketch
from fedraclora.strategies.shared.common import closed
from fedraclora.strategies.shared.initials import (
    STARTS,
    TAKEN_FROM_WEIGHTS,
    GradientProbeMethod,
    begin,
    bounded,
    check_start,
    gradient_factors,
    initial_factors,
)
from fedraclora.strategies.shared.layerwise import (
    Factors,
    Layer,
    LayerMethod,
    LayerUpdate,
    Replies,
    RoundContext,
    drawn_of,
)
from fedraclora.tree import Tree

# The drawn factor: A (right), B (left), or the larger one.
Label = Annotated[str, OneOf(("B", "A", "auto"))]
OTHER = {"B": "A", "A": "B", "auto": "auto"}


@dataclass(frozen=True)
class Asymmetric(LayerMethod):
    """Hyperparameters of methods with one drawn factor, beside those of `LowRankMethod`.

    The rank is bounded by a part of the drawn side: n / G if A is drawn.

    Attributes:
        sketch: A key of `fedraclora.sketch.SKETCHES`.
        normalize: ``rows``, ``identity`` (of each part) or ``none`` (`fedraclora.sketch`).
        sketches: G, equal parts of one drawing, each of the rank.
    """

    draws = "A"
    parts_are: ClassVar[str] = "sketches (method.sketches)"

    sketch: Sketch = "orthonormal"
    normalize: Normalize = "rows"
    sketches: Count = 1

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        check_sketch(self.sketch, self.normalize, "independent")

    def sides(self, shape: tuple[int, int]) -> tuple[str, str]:
        """Return the labels of the drawn and the trained factor."""
        return ("A", "B") if self.drawn_label(shape) == "A" else ("B", "A")

    @property
    @override
    def parts(self) -> int:
        return self.sketches

    @override
    def scale_of(self, rank: int) -> float:
        # E[A^T A] = I holds for all rows together, and each part has a G-th of it.
        parts = self.sketches**0.5 if self.normalize == "identity" else 1.0
        return super().scale_of(rank) * parts


@dataclass(frozen=True)
class DrawnFactorMethod(LayerMethod):
    """Hyperparameters of methods with an initially drawn factor, beside those of `LowRankMethod`.

    The rank is bounded by the drawn side: n if A is drawn.

    Attributes:
        init: How the drawn factor begins, a key of `fedraclora.sketch.SKETCHES`.
    """

    draws: ClassVar[str | None] = "A"

    init: str = "kaiming_uniform"

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        self.check_initial()

    def check_initial(self) -> None:
        """Reject an `initial` that does not exist, or does not fit."""
        check_start(self.init, fits=False, why=f"{type(self).__name__} has none such")

    def first(
        self, layer: Layer, now: RoundContext, label: str = "A", index: int = 0
    ) -> SketchSpec:
        """Draw a factor's first value; another ``index`` gives an independent one."""
        return now.sketch(layer, label, self.init, index=index)


@dataclass(frozen=True)
class CoreMethod(DrawnFactorMethod):
    """Hyperparameters of methods that train a core R between two frozen, drawn factors.

    The rank is bounded by the smaller side. R starts at zero, and its mean is continued.

    Attributes:
        init: How B and A are drawn, a key of `fedraclora.sketch.SKETCHES`.
    """

    traits = Traits(exact=True, linear=True, merges=False)
    link_rounds = None
    draws = None  # both factors are

    init: str = "orthonormal"

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        rank, own = self.parts * layer.rank, now.draw.sketch_seed(f"{layer.name}/B")
        return {
            "B": now.sketch(layer, "B", self.init, rank=rank, seed=own),
            "R": layer.trained("R", rank=rank),
            "A": now.sketch(layer, "A", self.init, rank=rank),
        }

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        return LayerUpdate(carried={"R": replies.mean("R")})  # R <- sum_k p_k R_k


@dataclass(frozen=True)
class Factored(GradientProbeMethod, DrawnFactorMethod):
    """Hyperparameters of methods that train both factors, beside those of `LowRankMethod`.

    Attributes:
        init: How the drawn factor begins, a key of `fedraclora.sketch.SKETCHES`; or how both do,
            one of `fedraclora.strategies.shared.initials.STARTS`.
        zero_init: The factor that begins at zero: ``B`` (A is random), ``A`` (B is random), or
            ``auto`` (the smaller one).
    """

    carries: ClassVar[bool] = True
    cuts_components: ClassVar[bool] = False
    """Whether components of factors that live on may be cut while the others go on."""
    truncates: ClassVar[bool] = False
    """Return whether a client with a budget has only its own components, without the frozen rest.
    """

    zero_init: Label = "B"

    @property
    def never_restarts(self) -> bool:
        """Return whether the factors are never reinitialized."""
        return self.carries or self.link_rounds is None

    @property
    @override
    def starts_with_factors(self) -> bool:
        return self.init in STARTS

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        drawn = self.drawn_label(layer.shape)
        if layer.carried or drawn is None:
            return super().factors(layer, now)
        start = self.first(layer, now, drawn, layer.link)  # each merge period has its own
        return {label: layer.trained(label, start if label == drawn else None) for label in "BA"}

    @PARTS_OF_WEIGHTS
    def _begins_with_parts(self) -> str:  # some methods begin with a probe, which holds none yet
        return f"method.init={self.init}" if self.init in STARTS else ""

    @override
    def _takes_from_weights(self) -> str:
        return f"method.init={self.init}" if self.init in TAKEN_FROM_WEIGHTS else ""

    @override
    def _ends_components(self) -> str:
        return "" if self.cuts_components and self.never_restarts else super()._ends_components()

    @FROM_ZERO
    def _begins_at_zero(self) -> bool:
        return not self.starts_with_factors

    @override
    def check_initial(self) -> None:
        check_start(self.init, fits=self.never_restarts, why="here they begin anew in each link")

    @override
    def layer_rank(self, plan: Plan, name: str) -> Rank:
        found = super().layer_rank(plan, name)
        return bounded(self.init, found, plan, name, cap=self.cap)

    @override
    def drawn_label(self, shape: tuple[int, int]) -> str | None:
        return None if self.starts_with_factors else drawn_of(OTHER[self.zero_init], shape)

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = super().initial_state(base, plan, draw)
        if self.starts_with_factors and not self.probe_rounds:
            return begin(state, self.init, *self.ranks_and_scales(plan), draw)
        return state

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        sent = super().open_round(state, round_, cohort, draw)
        return truncated(sent, sent.ranks) if self.truncates and sent.ranks is not None else sent

    # LoRA-GA begins with a probe.

    @property
    @override
    def probe_rounds(self) -> int:
        return int(self.init == "lora_ga")

    @override
    def started(self, state: State, gradients: Mapping[str, Product]) -> State:
        ranks, scales = self.ranks_and_scales(state.plan)
        found = {n: gradient_factors(*pair, ranks[n]) for n, pair in gradients.items()}
        carried, link = initial_factors(state, found, scales)
        return closed(state, link, carried=carried)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        if not self.probe_rounds or round_ == 1:
            return super().floats(plan, round_)
        return replace(self, init="pissa", rank=self.ranks_and_scales(plan)[0]).floats(plan, 2)


def truncated(sent: RoundInstructions, ranks: torch.Tensor) -> RoundInstructions:
    """Send each client its own components of continued factors, and zeros for the others.

    Args:
        sent: The instructions for all clients.
        ranks: Their budgets (`RoundInstructions.ranks`).
    """

    def own(name: str, factor: Factor) -> Factor:
        columns = name.endswith("/B")
        kept = within(ranks, factor.shape[1 if columns else 0])
        mask = kept[:, None] if columns else kept[..., None]
        return factor.with_numbers(lambda t: t * mask.to(t)) if factor.trained else factor

    return replace(sent, adapters=sent.mapped(own).adapters)
