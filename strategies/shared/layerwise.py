"""Define methods that treat one adapted matrix at a time.

    client k: local steps on the trained factors of  W + s F_1 F_2 (F_3)
    server:   per matrix, which factors are continued and which are merged into W

A method defines the first line in `LayerMethod.factors` and the second in `LayerMethod.update`. The
common parts are here: the loop over matrices, the tensors that are trained in full beside them,
rounding, the rounds since the last merge, effective weights, the count of sent numbers, and the
error of a round.
"""

# Hooks have arguments that only some overrides use.
# ruff: noqa: ARG002

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.errors import ConfigError
from fedraclora.limits import Limited
from fedraclora.lowrank.algebra import Product, sum_products
from fedraclora.narrow_weight import dense
from fedraclora.protocol.factor import FROZEN, LABELS, Factor, FactorLike, past_name
from fedraclora.protocol.method import (
    Adapter,
    Cohort,
    Draw,
    Link,
    Method,
    Plan,
    RoundInstructions,
    State,
    Term,
    apply_link,
)
from fedraclora.protocol.plan import (
    Rank,
    Ranks,
    check_patterns,
    check_rank,
    rank_notes,
    resolve_rank,
    resolve_scale,
)
from fedraclora.protocol.program import PLAIN, ClientProgram
from fedraclora.protocol.rank_budgets import uploaded_numbers
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.shared.common import (
    RoundError,
    closed,
    dense_floats,
    dense_means,
    dense_slots,
)
from fedraclora.strategies.shared.layer import (
    Factors,
    Layer,
    LayerUpdate,
    Replies,
    RoundContext,
    RoundReplies,
    known,
    multiplied,
)
from fedraclora.strategies.shared.sound import factors_of, kept_place, update_of
from fedraclora.tree import Tree, parameters, wide, widened

__all__ = ["Factors", "Layer", "LayerMethod", "LayerUpdate", "LowRank", "Replies", "RoundContext"]


@dataclass(frozen=True)
class LowRankMethod(Limited, Method, group="method"):
    """Hyperparameters of all low-rank methods.

    Attributes:
        rank: r; ``full``; a fraction of the bounding side if written with a dot (0.25); or these by
            layer (`fedraclora.protocol.plan.own_rank`). The bounding side is the smaller one, or
            that of a drawing.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        rslora: Scale s = alpha / sqrt(r) instead.
        cap: Cut the rank at the bounding side, with a note; False refuses a larger one.
    """

    rank: Ranks = 8
    alpha: float | str = "auto"
    rslora: bool = False
    cap: bool = True

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        if isinstance(self.rank, Mapping):  # layers may have numbers as names
            object.__setattr__(self, "rank", {str(k): rank for k, rank in self.rank.items()})
        check_rank(self.rank)
        resolve_scale(self.alpha, 1, rslora=self.rslora)

    @Feature("a number as method.alpha", reads=("method.rslora",))
    def _has_alpha(self) -> bool:
        return self.alpha != "auto"


LowRank = LowRankMethod  # for methods outside of the project that import it


def drawn_of(label: str | None, shape: tuple[int, int]) -> str | None:
    """Return the label of the drawn factor; for ``auto`` the larger one."""
    return ("A" if shape[1] >= shape[0] else "B") if label == "auto" else label


@dataclass(frozen=True)
class LayerMethod(LowRankMethod):
    """Base of methods that treat every adapted matrix alike, with `LowRankMethod`'s settings."""

    carries: ClassVar[bool] = False
    """Return whether trained factors outlive their merge period; False: they are merged at its end.
    """
    keeps: ClassVar[tuple[str, ...]] = ()
    """Labels of frozen factors that are kept through all merges, as numbers even if drawn."""
    draws: ClassVar[str | None] = None
    """Return the drawn factor, whose dimension bounds the rank: ``A``, ``B``, or the larger one
    (``auto``); None: neither or both, and the smaller side bounds it."""
    parts_are: ClassVar[str] = "factors (`parts` of the method)"
    """Return the reason why the dimension is shared, for messages."""

    # The hooks of a method.

    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        """Return the factors of one matrix for clients, by label; here they train both.

        Returns:
            For each label a trained factor (`Layer.trained`), or a frozen one: a tensor that is
            sent, a drawing (a seed), or one computed from the last merge.
        """
        return {"B": layer.trained("B"), "A": layer.trained("A")}

    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        """Compute the result of a round for one matrix.

        Args:
            layer: The layer as it was when the round was opened.
            replies: The clients' replies for it.
        """
        raise ConfigError(
            f"{type(self).__name__} has no method update(layer, replies), which computes the "
            "new state of one matrix. Write it (CONTRIBUTING.md, A new method)"
        )

    @property
    @override
    def link_rounds(self) -> int | None:
        """Return for how many rounds trained factors keep their coordinates; None: for all.

        That is the hyperparameter ``merge_every`` if a method has one, else 1.
        """
        return getattr(self, "merge_every", 1)

    @property
    @override
    def begins_with_last(self) -> bool:
        return bool(self.carries or self.keeps) and self.link_rounds is not None

    @property
    def starts_with_factors(self) -> bool:
        """Return whether the state has factors before the first round."""
        return False

    def subset(self, plan: Plan, round_: int) -> Plan:
        """Choose the matrices that a round adapts; all by default."""
        return plan

    def program(self, plan: Plan) -> ClientProgram:
        """Return the client program, if clients do more than plain local steps; here none.

        Args:
            plan: The plan with the round's adapted matrices.
        """
        return PLAIN

    @property
    @override
    def looks_at_clients(self) -> bool:
        return not self.traits.exact  # then the error of a round is measured

    def components(self, cohort: Cohort, now: RoundContext) -> torch.Tensor | None:
        """Choose which components each client trains (`RoundInstructions.ranks`); None: all."""
        return cohort.ranks if self.traits.ranks else None

    @property
    def parts(self) -> int:
        """Return how many factors of a layer's rank share the dimension that bounds it."""
        return 1

    # Derived functions.

    def drawn_label(self, shape: tuple[int, int]) -> str | None:
        """Return the label of the drawn factor; None if none or both are drawn."""
        return drawn_of(self.draws, shape)

    def layer_rank(self, plan: Plan, name: str) -> Rank:
        """Compute the rank of one layer, and a note if it is not the requested one."""
        shape, parts, of = plan.targets[name].shape, self.parts, self.parts_are
        drawn = self.drawn_label(shape)
        dim = min(shape) if drawn is None else shape["BA".index(drawn)]
        if parts > dim:
            raise ConfigError(
                f"{parts} {of} share the {dim} dimensions of {name}, which are too few. Use fewer"
            )
        return resolve_rank(self.rank, dim, name, cap=self.cap, parts=parts, of=of)

    def rank_of(self, plan: Plan, name: str) -> int:
        """Return the rank of one layer."""
        return self.layer_rank(plan, name).value

    def scale_of(self, rank: int) -> float:
        """Return the scale s of a layer with a rank."""
        return resolve_scale(self.alpha, rank, rslora=self.rslora)

    def ranks_and_scales(self, plan: Plan) -> tuple[dict[str, int], dict[str, float]]:
        """Return r and s of every layer, by weight."""
        ranks = {name: self.rank_of(plan, name) for name in plan.targets}
        return ranks, {name: self.scale_of(rank) for name, rank in ranks.items()}

    def layers_of(self, state: State) -> Iterator[Layer]:
        """Yield the adapted matrices of a state."""
        return (self.layer(state, name) for name in state.plan.targets)

    def layer(self, state: State, name: str) -> Layer:
        """Return one adapted matrix as the method sees it."""
        plan, carried, rank = state.plan, state.carried, self.rank_of(state.plan, name)

        def held(prefix: str) -> Tree:
            return {k: carried[key] for k in LABELS if (key := f"{prefix}{name}/{k}") in carried}

        return Layer(
            name=name,
            shape=plan.targets[name].shape,
            rank=rank,
            scale=self.scale_of(rank),
            carried=held(""),
            link=state.counters.sketch,
            ends=state.counters.age + 1 == self.link_rounds,
            dtype=wide(state.base[name].dtype),
            past=state.base.get(past_name(name)),
            frozen=held(FROZEN),
        )

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        check_patterns(self.rank, plan.targets)
        notes = rank_notes(self.layer_rank(plan, name) for name in plan.targets)
        return State(base, plan, counters=self.counters(), notes=notes)

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        now, plan = RoundContext(round_, draw), self.subset(state.plan, round_)
        return RoundInstructions(
            {name: self.adapter(self.layer(state, name), now) for name in plan.targets},
            dense_slots(state),
            program=self.program(plan),
            ranks=self.components(cohort, now),
            link=state.counters.sketch,
        )

    def adapter(self, layer: Layer, now: RoundContext) -> Adapter:
        """Return the adapter of one matrix, with factors in the order of their product."""
        found = factors_of(self, layer, now)
        found |= {
            label: Factor.of(sent)
            for label, sent in layer.frozen.items()
            if label in found and not found[label].trained
        }
        adapter = Adapter.of(found, layer.scale)
        stays = [label for label, asked in adapter.factors.items() if not asked.upload]
        if stays and not self.client_state:
            raise ConfigError(
                f"{type(self).__name__} leaves the factor {stays[0]} at each client "
                "(upload=False), but does not declare client state. Write client_state = "
                "True in the class"
            )
        return adapter

    @override
    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        came = RoundReplies(state, sent, uplinks)
        looks = self.looks_at_clients and uplinks.has_individuals and not self.client_state
        error = RoundError() if looks else None
        carried: Tree = {}
        terms: dict[str, Term] = {}
        for name, adapter in sent.adapters.items():
            layer = self.layer(state, name)
            replies = Replies(came, name)
            update = update_of(self, layer, replies)
            if error is not None:
                new = update.aggregate or _left(layer, replies, update)
                error.add(replies.product(), replies.carried, new, layer.scale)
            for label, value in update.carried.items():
                numbers = self.carried_numbers(layer, known(label), Factor.of(value))
                carried[f"{name}/{label}"] = numbers.to(layer.dtype)
            keep = kept_place(update, layer)
            if merged := _rounded(update.merged or (), layer.dtype):
                terms[name] = Term(merged, adapter.scale, keep=keep)
        ends = state.counters.age + 1 == self.link_rounds
        dense = dense_means(state, came.mean, self.traits.step)
        link = self.merge(state, terms, dense)
        report = {} if error is None else error.report()
        return closed(state, link, carried=carried, ends=ends, report=report)

    def carried_numbers(self, layer: Layer, label: str, given: Factor) -> torch.Tensor:
        """Return the numbers of a continued factor, or of a drawing in `keeps`.

        Raises:
            ConfigError: If it is another drawing, whose numbers `floats` does not count.
        """
        if given.numbers is None and label not in self.keeps:
            raise ConfigError(
                f"LayerUpdate(carried=...) of {layer.name}: {label} is a random factor, which "
                f'travels as a seed. Set keeps = ("{label}",) in {type(self).__name__} to carry '
                "and count its numbers, or leave it out (replies.means(drawn=False)) and draw it "
                "again by now.sketch with the same index"
            )
        return given.draw().detach()

    def merge(self, state: State, terms: dict[str, Term], dense: Tree) -> Link:
        """Build the merge of a round from its products and means."""
        return Link(terms, dense)

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        """Compute W + s times the product of the current factors, for every matrix."""
        held = dense({name: state.base[name] for name in state.plan.targets})
        base = widened(parameters(state.base) | held)
        return apply_link(base, self.current_update(state, draw, own), state.plan)

    def current_update(self, state: State, draw: Draw, own: Tree | None = None) -> Link:
        """Compute the product of the current factors, which is added to the base."""
        own, now, terms = own or {}, RoundContext(1, draw), {}
        for layer in self.layers_of(state):
            found = self.adapter(layer, now).factors.items()
            factors = [Factor.of(own.get(f"{layer.name}/{label}", f)) for label, f in found]
            if not any(f.blank for f in factors):  # otherwise one is zero, and so is their product
                terms[layer.name] = Term(tuple(factors), layer.scale)
        return Link(terms)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        """Count the sent numbers: all of continued factors, and the starts of others."""
        lasts = None if self.carries else self.link_rounds
        first = 1 + (round_ - 1) // lasts * lasts if lasts else 1  # number of merges
        ranks = self.components(NOBODY, RoundContext(round_, Draw(0)))
        up, down = dense_floats(plan), 0
        for name in self.subset(plan, round_).targets:
            carried = (
                {*"BA"} if self.starts_with_factors else {*self.keeps} if round_ > 1 else set()
            )
            # Factors that take turns are continued after one round each: two rounds show both.
            for before in range(first, min(round_, first + 2)):
                factors = self.new_factors(plan, name, before).factors.items()
                carried |= {label for label, f in factors if f.trained and f.upload}
            asked = self.new_factors(plan, name, round_)
            up += int(uploaded_numbers(RoundInstructions({name: asked}, ranks=ranks), 1))
            factors = asked.factors.items()
            down += sum(prod(f.shape) if label in carried else f.floats for label, f in factors)
        return up, down

    def new_factors(self, plan: Plan, name: str, round_: int) -> Adapter:
        """Return the factors for clients in a round, for a matrix without continued ones."""
        rank, link = self.rank_of(plan, name), (round_ - 1) // (self.link_rounds or round_)
        layer = Layer(name, plan.targets[name].shape, rank, self.scale_of(rank), {}, link)
        return self.adapter(layer, RoundContext(round_, Draw(0)))


# For a round of which only the size is needed.
NOBODY = Cohort(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64))


def _left(layer: Layer, replies: Replies, update: LayerUpdate) -> Product:
    """Add continued and merged factors; an empty product if there are none."""
    factors, carried = replies.adapter.factors, update.carried
    crosses = any(f.trained and k in carried for k, f in factors.items())
    if layer.ends and crosses and not factors.keys() <= carried.keys():
        raise ConfigError(
            f"{layer.name}: a trained factor is carried after its merge, but its frozen "
            "partner in the next round is not known. Pass LayerUpdate(aggregate=...), the "
            "product after this round, so that the aggregation error can be measured"
        )
    nothing = torch.zeros(layer.m, 0), torch.zeros(0, layer.n)
    merged = multiplied(update.merged) if update.merged else None
    parts = replies.product_of(update.carried), merged
    return sum_products(*(part for part in parts if part is not None)) if any(parts) else nothing


def _rounded(merged: tuple[FactorLike, ...], dtype: torch.dtype) -> tuple[Factor, ...]:
    """Round matrices to the precision in which they are stored; an empty product gives none."""
    found = tuple(Factor.of(f).with_numbers(lambda t: t.detach().to(dtype)) for f in merged)
    return found if all(prod(f.shape) for f in found) else ()
