"""Fed-RAC-LoRA on a pool of K sketches that recur: links under one sketch add up.

Round t, right sketch, per adapted matrix W (m x n) with s = alpha / r:

    W_t = W_0 + s sum_j B^(j) A_j        A_0 .. A_{K-1} (r x n) drawn from a seed
    j = (t - 1) mod K;  client k: trains B_k from 0 under W_t + s B_k A_j
    B^(j) <- B^(j) + sum_k p_k B_k

``refresh = E`` folds the pool into W after E rounds, an era, and draws K new sketches; None never
does: W_0 stays as it is, and the run is one adapter of rank K r. Under ``blocks=cover`` sketches
are blocks of one basis. Where K r = n they tile it: with E = K, ``fed_rac_lora blocks=cover``.

- Uplink: r m numbers per matrix and client (left: r n). Downlink: a seed, and min(q, K) r m numbers
  after q rounds away, K r m for a newcomer; K r m more for each refresh in between, at most m n for
  all of them. Within a link of several rounds r m numbers more, the carried factor.
- Aggregation: exact and linear, as in Fed-RAC-LoRA, whose rounds these are.
- Server and replicas: K r m numbers per matrix beside W (`fedraclora.protocol.pool`).
- K r is at most n: the rank is cut at n / K. A fraction is a share of n / K, so that ``rank=1.0``
  tiles every layer whose n is a multiple of K.
- Source: Malinovsky et al., *Randomized Asymmetric Chain of LoRA*, 2024, arXiv 2410.08305, for the
  rounds. The pool is ours; what it can reach is in ``docs/records/theory.md``.
- Departures: those of Fed-RAC-LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.limits import Count
from fedraclora.protocol.method import Cohort, Downlink, Draw, Link, Plan, State, Term, Traits
from fedraclora.protocol.pool import Pool, added, part_name
from fedraclora.sketch import Blocks
from fedraclora.strategies.fed_rac_lora import FedRacLora
from fedraclora.strategies.shared.layerwise import Round
from fedraclora.tree import Tree


@dataclass(frozen=True)
class PoolRacLora(FedRacLora):
    """Fed-RAC-LoRA on a pool of sketches that recur, so that absent clients fetch each part once.

    Attributes:
        blocks: As there; ``cover`` by default, so that the sketches of a pool are orthogonal.
        pool: K, sketches of each layer.
        refresh: E, rounds of an era; None: the first pool serves for ever.
    """

    blocks: Blocks = "cover"
    pool: Count = 4
    refresh: int | None = None

    @override
    def sketch_number(self, link: int) -> int:
        era, turn = self.turn(link)
        return era * self.pool + turn % self.pool

    def turn(self, link: int) -> tuple[int, int]:
        """Compute the era that a link belongs to, and how many links of the era came before it."""
        return (0, link) if self.refresh is None else divmod(link, self.refresh // self.link_rounds)

    @override
    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = super().init(base, plan, draw)
        return replace(state, base=state.base | self.blank(state))

    def blank(self, state: State) -> Tree:
        """Build the parts of all pools as they begin: without numbers."""
        return {
            part_name(layer.name, trained, j): state.base[layer.name].new_zeros(
                layer.trained(trained, rank=0).shape, dtype=layer.dtype
            )
            for layer in self.layers_of(state)
            for trained in self.sides(layer.shape)[1:]
            for j in range(self.pool)
        }

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        sent = super().open_round(state, round_, cohort, draw)
        era, j = self.turn(state.memo.sketch)
        return replace(sent, pools=self.pools(state, draw), turn=(j % self.pool, self.pool, era))

    def pools(self, state: State, draw: Draw) -> dict[str, Pool]:
        """Say what stands beside each weight; nothing does where an era begins."""
        found: dict[str, Pool] = {}
        turn = self.turn(state.memo.sketch)[1]
        for layer in self.layers_of(state) if turn else ():
            adapter = self.adapter(layer, Round(1, draw))
            sketch = next(spec for f in adapter.factors.values() if (spec := f.drawing))
            pool = Pool.around(sketch, turn % self.pool, self.pool, adapter.scale)
            found[layer.name] = pool.begun(turn)
        return found

    @override
    def merge(self, state: State, terms: dict[str, Term], dense: Tree) -> Link:
        """Add each product to its part; where an era ends, fold pools into W and empty them."""
        link, parts, pools = state.memo.sketch, Tree(), dict[str, Pool]()
        place = self.turn(link)[1] % self.pool
        for name, term in terms.items():
            for label, factor in zip("BA", term.factors, strict=True):
                if factor.numbers is not None:
                    part = part_name(name, label, place)
                    parts[part] = added(state.base[part], factor.numbers)
                if factor.drawing is not None:
                    pools[name] = Pool.around(factor.drawing, place, self.pool, term.scale)
        if not terms or self.turn(link + 1)[1]:  # within a link, or an era
            return Link(dense=dense | parts)
        folded = {name: pool.term(name, state.base | parts) for name, pool in pools.items()}
        return Link(folded, dense | self.blank(state))

    @override
    def standing(self, state: State, draw: Draw, own: Tree | None = None) -> Link:
        terms = {name: p.term(name, state.base) for name, p in self.pools(state, draw).items()}
        return Link(terms, rest=(super().standing(state, draw, own),))

    @property
    @override
    def link_rounds(self) -> int:
        return self.resample_every or 1

    @property
    @override
    def parts(self) -> int:
        return self.sketches * self.pool

    @property
    @override
    def traits(self) -> Traits:
        return replace(super().traits, merges=self.refresh is not None, pools=True)

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        if self.resample_every is None:
            raise ConfigError(
                "method.resample_every is null, but a pool goes from sketch to sketch; take 1 or "
                "more, or method=ffa_lora"
            )
        least, rounds = self.pool * self.resample_every, self.refresh
        if rounds is not None and (rounds < least or rounds % self.resample_every):
            raise ConfigError(
                f"method.refresh is {rounds}; null, or a multiple of method.resample_every "
                f"({self.resample_every}) from {least} on, by which all {self.pool} sketches have "
                "had a turn, is wanted"
            )
