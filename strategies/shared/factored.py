"""Methods whose clients train both factors of every adapter: what they have in common.

    client k: (B_k, A_k) from (B_0, A_0), local steps on both;  effective weight W + s B A
    server:   per weight, what the next round starts from and what is folded into W

A method says the second line (`Factored.conclude`); messages, starts, links, rounding and the error
of the round are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from fedraclora.adapter import Rank
from fedraclora.aggregate import Uplinks
from fedraclora.errors import ConfigError
from fedraclora.lowrank import Product, sum_products
from fedraclora.method import (
    Adapter,
    Cohort,
    Downlink,
    Draw,
    Link,
    Plan,
    State,
    Term,
    Trained,
)
from fedraclora.ranks import within
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree
from strategies.shared import initials
from strategies.shared.common import (
    check_link,
    closed,
    dense_floats,
    dense_means,
    dense_slots,
    drawn_rank,
    draws_right,
)
from strategies.shared.drawn import Drawn, Ranked
from strategies.shared.products import RoundError, carried_product, with_carried
from strategies.shared.replies import Replies, replies_of


@dataclass(frozen=True)
class Conclusion:
    """What a method makes of the replies for one weight: products, without the scale.

    Attributes:
        carried: The factors that the next round starts from; None: it starts anew.
        merged: Folded into the base weight; None: nothing.
    """

    carried: Product | None = None
    merged: Product | None = None


@dataclass(frozen=True)
class Factored(Drawn):
    """Hyperparameters that all of them have, beside those of `Drawn`.

    Attributes:
        side: ``right`` (A begins as a drawing, B at zero), ``left`` (the other way round), ``auto``
            (the larger factor is drawn).
    """

    continues: ClassVar[bool] = False
    """Whether a round starts from the means of the one before: then moments may live on."""
    carries: ClassVar[bool] = True
    """Whether the factors outlive a round."""
    truncates: ClassVar[bool] = False
    """Whether a client with a budget holds its own components alone, and not the rest frozen."""

    side: str = "right"

    @override
    def __post_init__(self) -> None:
        """Refuse impossible hyperparameters."""
        super().__post_init__()
        check_link(self.side, None)

    @property
    def lives_on(self) -> bool:
        """Whether the factors are never begun anew."""
        return self.carries

    @override
    def check_initial(self) -> None:
        initials.check_start(
            self.initial, fits=self.lives_on, why="here they begin anew in each link"
        )
        if self.initial in initials.STARTS and self.side != "right":
            raise ConfigError(
                f"method.side is {self.side}, which says what is drawn, but method.initial is "
                f"{self.initial}, with which neither factor is; leave it at right"
            )

    @override
    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = super().init(base, plan, draw)
        if self.initial in initials.STARTS and not self.probes(state):
            return initials.begin(state, self.initial, *self.ranks_and_scales(plan), draw)
        return state

    def probes(self, state: State) -> bool:
        """Whether the next round asks for gradients, from which the factors will begin."""
        return self.initial == "lora_ga" and not state.memo["sketch"]

    def conclude(self, replies: Replies) -> Conclusion:
        """Say what follows from the replies for one weight."""
        raise NotImplementedError

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        del round_
        if self.probes(state):
            return initials.first_probe(state.plan, self.ranks_and_scales(state.plan)[0], draw)
        ranks = cohort.ranks if self.traits.ranks else None
        adapters = {}
        for name, view in state.plan.targets.items():
            m, n = view.shape
            rank = self.rank_of(state.plan, name)
            starts = self.starts(state, name, draw)
            B, A = starts["B"], starts["A"]
            if ranks is not None and self.truncates and state.carried:
                kept = within(ranks, rank)
                B, A = B * kept[:, None].to(B), A * kept[..., None].to(A)  # type: ignore[operator,arg-type]
            factors = {"B": Trained((m, rank), B), "A": Trained((rank, n), A)}
            adapters[name] = Adapter(dict(factors), self.scale_of(state.plan, name))
        return Downlink(adapters, dense_slots(state), ranks=ranks, link=state.memo["sketch"])

    @override
    def next_exchange(self, state: State, sent: Downlink, got: Uplinks) -> Downlink | None:
        return initials.second_probe(sent, got) if self.probes(state) else None

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        if not self.probes(state):
            return self.close(state, sent, got)
        carried, link = initials.probed(state, sent, got, *self.ranks_and_scales(state.plan))
        return closed(state, link, carried=carried)

    def close(self, state: State, sent: Downlink, got: Uplinks) -> State:
        """Close a round in which clients trained."""
        stack, mean = got.stack(), got.mean()
        carried: Tree = {}
        terms: dict[str, Term] = {}
        error = RoundError()
        for name, adapter in sent.adapters.items():
            replies = replies_of(state, sent, got, name, stack, mean)
            out = self.conclude(replies)
            parts = [part for part in (out.carried, out.merged) if part is not None]
            if not self.traits.exact:
                new = sum_products(*parts)
                error.add(replies.product(), carried_product(state, name), new, adapter.scale)
            dtype = state.base[name].dtype
            if out.carried is not None:
                labels = (f"{name}/B", f"{name}/A")
                carried |= {k: t.to(dtype) for k, t in zip(labels, out.carried, strict=True)}
            if out.merged is not None and out.merged[0].shape[1]:
                B, A = (t.to(dtype) for t in out.merged)
                terms[name] = Term((B, A), adapter.scale)
        link = Link(terms, dense_means(state, mean))
        report = error.report() if not self.traits.exact else {}
        return closed(state, link, carried=carried, ends=not self.continues, report=report)

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        del draw, own
        return with_carried(state, self.scale_of)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        factors = sum(self.numbers(plan))
        if self.initial == "lora_ga" and round_ == 1:
            return initials.probe_floats(plan, self.ranks_and_scales(plan)[0])
        begun_already = round_ > 1 or self.initial in initials.STARTS
        return factors + dense_floats(plan), factors if self.carries and begun_already else 0

    @override
    def layer_rank(self, plan: Plan, name: str) -> Rank:
        if self.initial not in initials.STARTS:
            return drawn_rank(self.rank, self.side, plan, name, cap=self.cap)
        found = Ranked.layer_rank(self, plan, name)
        return initials.bounded(self.initial, found, plan, name, cap=self.cap)

    def starts(
        self, state: State, name: str, draw: Draw
    ) -> dict[str, torch.Tensor | SketchSpec | None]:
        """Give where the factors of a layer start: as they are, or a drawing and zero."""
        if state.carried:
            return {label: state.carried[f"{name}/{label}"] for label in ("B", "A")}
        right = draws_right(self.side, state.plan, name)
        spec = self.sketch(state.plan, name, draw, index=state.memo["sketch"], right=right)
        return {"B": None, "A": spec} if right else {"B": spec, "A": None}
