"""Fed-RAC-LoRA on a pool of K sketches that recur: updates under the same sketch add up.

Round t, right sketch, per adapted matrix W (m x n) with s = alpha / r:

    W_t = W_0 + s sum_j B^(j) A_j        A_0 .. A_{K-1} (r x n) drawn from a seed
    j = (t - 1) mod K;  client k: trains B_k from 0 under W_t + s B_k A_j
    B^(j) <- B^(j) + sum_k p_k B_k

``refresh = E`` merges the pool into W after E rounds (an era) and draws K new sketches. None never
does: W_0 stays as it is, and the run is one adapter of rank K r. Under ``blocks=cover`` the
sketches are row blocks of one orthonormal basis. If K r = n they are a whole basis; with E = K the
run is then that of ``fed_rac_lora blocks=cover``.

- Uplink: r m numbers per matrix and client (left: r n).
- Downlink: a seed, and min(q, K) r m numbers after q missed rounds, K r m for a new client. K r m
  numbers more for each refresh in between; at most m n for all of them. If ``merge_every`` is above
  1, r m numbers more for the current trained factor.
- Aggregation: exact and linear, as in Fed-RAC-LoRA, whose rounds these are.
- Server and replicas: K r m numbers per matrix beside W.
- K r is at most n: the rank is limited to n / K. A fraction is a fraction of n / K, so that
  ``rank=full`` gives a whole basis in every layer whose n is a multiple of K.
- Source: Malinovsky et al., *Randomized Asymmetric Chain of LoRA*, 2024, arXiv 2410.08305, for the
  rounds. The pool is ours; what it can reach is in ``docs/records/theory.md``.
- Departures: those of Fed-RAC-LoRA.

A pool is stored beside its weight and is not added to it. Server and replicas keep each trained
part B^(j) among their base weights, under its own name. A merge sends the new value of one part:
the sum of all updates under that sketch, rounded once at the server. Therefore every replica has
the same bits, however many rounds it missed, and downloads each part once
(`fedraclora.weights.chain.LinkSizes`). A part that has not been trained yet has no numbers.
`Pool.term` alone defines how parts add up. Clients train beside its result, the server evaluates
with it, and it is merged into W at the end of an era.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.limits import Count
from fedraclora.narrow_weight import is_narrow
from fedraclora.protocol.factor import Factor
from fedraclora.protocol.link import Terms
from fedraclora.protocol.method import (
    Cohort,
    Draw,
    Link,
    Plan,
    RoundInstructions,
    State,
    Term,
    Traits,
    apply_link,
)
from fedraclora.protocol.program import PLAIN, ClientProgram
from fedraclora.sketch import Blocks, SketchSpec
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.shared.layerwise import RoundContext
from fedraclora.tree import Tree, parameters
from fedraclora.wire.fields import whole_number


def part_name(weight: str, label: str, place: int) -> str:
    """Name the part of a pool in base weights; parameters have no "/" in their names."""
    return f"{weight}/{label}.{place}"


@dataclass(frozen=True)
class Pool:
    """Hold the parts of a pool that are stored beside one weight.

    Attributes:
        first: The first frozen factor; the others have the numbers after its own.
        count: Parts that have numbers.
        scale: s.
    """

    first: SketchSpec
    count: int
    scale: float

    @classmethod
    def containing(cls, sketch: SketchSpec, place: int, size: int, scale: float) -> Pool:
        """Build the pool of ``size`` sketches in which one sketch has the given place."""
        return cls(replace(sketch, index=sketch.index - place), size, scale)

    @property
    def frozen(self) -> Factor:
        """Return all frozen factors as one."""
        return Factor(sketch=self.first, count=self.count)

    def after_merges(self, links: int) -> Pool:
        """Keep the parts that have numbers after the first merges of an era."""
        return replace(self, count=min(links, self.count))

    def term(self, weight: str, base: Mapping[str, torch.Tensor]) -> Term:
        """Join the parts into one product of rank K r, in the order of their numbers."""
        right, frozen = self.first.side == "right", self.frozen
        label, dim = ("B", 1) if right else ("A", 0)
        parts = [base[part_name(weight, label, j)] for j in range(self.count)]
        trained = torch.cat(parts, dim)
        return Term.of((trained, frozen) if right else (frozen, trained), self.scale)


def added(part: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """Add an update to the part of its sketch, rounded once; a part without numbers is zero."""
    if not part.numel():
        return more
    return (part.to("cpu", torch.float64) + more.to("cpu", torch.float64)).to(more.dtype)


@dataclass(frozen=True)
class PoolProgram(ClientProgram, group="method"):
    """Let clients train beside the pool of each weight.

    Attributes:
        pools: By weight, the pool that every replica stores, also of weights not adapted now.
        turn: The place of the current sketch, the number of sketches, and the era.
    """

    name = "pool"
    plain = True

    pools: dict[str, Pool]
    turn: tuple[int, int, int]

    @property
    @override
    def stream(self) -> str:
        return PLAIN.name

    @property
    @override
    def payload_bytes(self) -> int:
        return 0  # the turn belongs to the header

    @property
    @override
    def frame(self) -> tuple[int, int, int]:
        return self.turn

    @override
    def stored_parts(self, weight: str, label: str) -> tuple[str, ...]:
        return tuple(part_name(weight, label, place) for place in range(self.turn[1]))

    @override
    def initial_part(self) -> ClientProgram:
        return replace(self, turn=(0, 1, 0))

    @override
    def check(self, downlink: RoundInstructions) -> None:
        for weight, pool in self.pools.items():
            first, most = pool.first, max(1, pool.first.dim // pool.first.rank)
            whole_number(first.seed, f"the seed of the pool of {weight}")
            whole_number(pool.count, f"the number of parts of the pool of {weight}", 1, most)
        place, count, era = self.turn
        drawn = (f.drawing for f in downlink.factors().values())
        room = [spec.dim // spec.rank for spec in drawn if spec is not None]
        whole_number(count, "the number of turns of a pool", 1, min(room, default=1))
        whole_number(place, "the turn of a pool", 0, count - 1)
        whole_number(era, "the era of a pool")

    @override
    def fold(self, base: Mapping[str, torch.Tensor], plan: Plan) -> tuple[Tree, Terms]:
        terms = {name: pool.term(name, base) for name, pool in self.pools.items()}
        narrow = {n: t for n, t in terms.items() if is_narrow(base[n])}
        folded = Link({n: t for n, t in terms.items() if n not in narrow})
        return apply_link(parameters(base), folded, plan), narrow


@dataclass(frozen=True)
class PoolRacLora(FedRacLora):
    """Fed-RAC-LoRA on a pool of sketches that recur, so that absent clients fetch each part once.

    Attributes:
        blocks: As in Fed-RAC-LoRA; ``cover`` by default, so that a pool's sketches are orthogonal.
        pool: K, sketches of each layer.
        refresh: E, rounds between new pools; None: the first pool is kept.
    """

    parts_are = "sketches (method.sketches times method.pool)"

    blocks: Blocks = "cover"
    pool: Count = 4
    refresh: int | None = None

    @override
    def sketch_number(self, link: int) -> int:
        era, turn = self.turn(link)
        return era * self.pool + turn % self.pool

    def turn(self, link: int) -> tuple[int, int]:
        """Compute the era of a merge, and how many merges of that era came before it."""
        return (0, link) if self.refresh is None else divmod(link, self.refresh // self.link_rounds)

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = super().initial_state(base, plan, draw)
        return replace(state, base=state.base | self.blank(state))

    def blank(self, state: State) -> Tree:
        """Build the parts of all pools without numbers, as a run starts."""
        return {
            part_name(layer.name, trained, j): state.base[layer.name].new_zeros(
                layer.trained(trained, rank=0).shape, dtype=layer.dtype
            )
            for layer in self.layers_of(state)
            for trained in self.sides(layer.shape)[1:]
            for j in range(self.pool)
        }

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        sent = super().open_round(state, round_, cohort, draw)
        era, j = self.turn(state.counters.sketch)
        turn = j % self.pool, self.pool, era
        return replace(sent, program=PoolProgram(self.pools(state, draw), turn))

    def pools(self, state: State, draw: Draw) -> dict[str, Pool]:
        """Build the pool beside each weight; it is empty at the start of an era."""
        found: dict[str, Pool] = {}
        turn = self.turn(state.counters.sketch)[1]
        for layer in self.layers_of(state) if turn else ():
            adapter = self.adapter(layer, RoundContext(1, draw))
            sketch = next(spec for f in adapter.factors.values() if (spec := f.drawing))
            pool = Pool.containing(sketch, turn % self.pool, self.pool, adapter.scale)
            found[layer.name] = pool.after_merges(turn)
        return found

    @override
    def merge(self, state: State, terms: dict[str, Term], dense: Tree) -> Link:
        """Add each product to its part; at the end of an era, merge pools into W and empty them."""
        link, parts, pools = state.counters.sketch, Tree(), dict[str, Pool]()
        place = self.turn(link)[1] % self.pool
        for name, term in terms.items():
            for label, factor in zip("BA", term.factors, strict=True):
                if factor.numbers is not None:
                    part = part_name(name, label, place)
                    parts[part] = added(state.base[part], factor.numbers)
                if factor.drawing is not None:
                    pools[name] = Pool.containing(factor.drawing, place, self.pool, term.scale)
        if not terms or self.turn(link + 1)[1]:  # within a link, or an era
            return Link(dense=dense | parts)
        folded = {name: pool.term(name, state.base | parts) for name, pool in pools.items()}
        return Link(folded, dense | self.blank(state))

    @override
    def current_update(self, state: State, draw: Draw, own: Tree | None = None) -> Link:
        terms = {name: p.term(name, state.base) for name, p in self.pools(state, draw).items()}
        return Link(terms, rest=(super().current_update(state, draw, own),))

    @property
    @override
    def link_rounds(self) -> int:
        return self.merge_every or 1

    @property
    @override
    def parts(self) -> int:
        return self.sketches * self.pool

    @property
    @override
    def recurs(self) -> bool:
        return True

    @property
    @override
    def traits(self) -> Traits:
        return replace(super().traits, merges=self.refresh is not None)

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        if self.merge_every is None:
            raise ConfigError(
                "method.merge_every=null: a pool changes its sketch with every merge. Set it "
                "to 1 or more, or use method=ffa_lora"
            )
        least, rounds = self.pool * self.merge_every, self.refresh
        if rounds is not None and (rounds < least or rounds % self.merge_every):
            raise ConfigError(
                f"method.refresh={rounds}: all {self.pool} sketches must have been used "
                "before a refresh. Set it to null, or to a multiple of method.merge_every "
                f"({self.merge_every}) of at least {least}"
            )
