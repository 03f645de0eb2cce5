"""Fed-RAC-LoRA: one random sketch per matrix and round, shared by the cohort.

Round t, right sketch, per adapted matrix W (m x n) with s = alpha / r:

    A_t ~ D (r x n), drawn from a seed;  client k: B_k = 0, local steps on B_k only
    B_bar = sum_k p_k B_k;               W <- W + s B_bar A_t

A left sketch draws B_t (m x r) and trains A_k (r x n). ``resample_every = k`` carries the trained
factor for k rounds and merges it when the sketch is drawn anew; None never does (FFA-LoRA).

- Uplink: r m numbers per matrix and client (left: r n). Downlink: a seed, and what the client
  missed: r m numbers per link, at most m n; plus the carried factor where k > 1.
- Aggregation: exact and linear, since the factor that is not averaged is the same everywhere; with
  ``server_lr`` the new weights go beyond that mean by a known factor.
- ``sketches = G`` deals the cohort at random into G groups of equal size, and cuts one drawing of
  G r rows into G parts: group g trains r columns under part g. Uplink as before, and G r m numbers
  per link to catch up on. ``server_lr = G`` then takes in each column the mean of its group.
- ``server_lr = eta``: W <- W + eta (mean of the clients' weights - W), biases and head included.
- Rank budgets: client k trains the first r_k components and sends r_k m numbers (left: r_k n); the
  rest of a carried factor, which it downloads whole, stays as it is (`fedraclora.ranks`). Exact.
- Source: Malinovsky et al., *Randomized Asymmetric Chain of LoRA*, 2024, arXiv 2410.08305.
  FFA-LoRA: Sun et al., *Improving LoRA in privacy-preserving federated learning*, ICLR 2024,
  arXiv 2403.12313.
- Departures: the default sketch has orthonormal rows (same row space as the paper's Gaussian, but
  the local step is then the step of the theory); the cohort and the number of local steps are
  ours to choose, since the paper's federated algorithm is known in outline only; FFA-LoRA's
  A is drawn with orthonormal rows too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from typing_extensions import override

from fedraclora.adapter import Rank, resolve_rank, resolve_scale
from fedraclora.aggregate import Uplinks
from fedraclora.errors import ConfigError
from fedraclora.method import (
    Adapter,
    Cohort,
    Downlink,
    Draw,
    Factor,
    Link,
    Method,
    Plan,
    Sketched,
    State,
    Term,
    Trained,
    Traits,
    apply_link,
)
from fedraclora.rng import generator
from fedraclora.sketch import SketchSpec, check_sketch
from fedraclora.tree import Tree
from strategies.shared.common import (
    FIRST_LINK,
    check_link,
    dense_floats,
    dense_means,
    dense_slots,
    drawn_rank,
    draws_right,
    mean_terms,
    next_link,
)


@dataclass(frozen=True)
class FedRacLora(Method):
    """Hyperparameters of Fed-RAC-LoRA (and of FFA-LoRA, with ``resample_every=None``).

    Attributes:
        rank: r; a fraction (0, 1] of the drawn side's dimension if written with a dot.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        sketch: A key of `fedraclora.sketch.SKETCHES`.
        side: ``right`` (A drawn), ``left`` (B drawn), ``auto`` (the trained factor is smaller).
        normalise: ``rows``, ``identity`` or ``none`` (`fedraclora.sketch`).
        blocks: ``independent``, or ``cover`` (row blocks of one basis without replacement).
        resample_every: Rounds that a sketch lives; None = for ever.
        density: Share of non-zero entries of ``sparse_sign``.
        cap: Cut the rank at the drawn side's dimension, with a note; False refuses it.
        sketches: G, groups of the cohort, each under rows of its own; G r is at most the dimension.
        server_lr: eta, the server's step.
    """

    rank: int | float = 8
    alpha: float | str = "auto"
    sketch: str = "orthonormal"
    side: str = "right"
    normalise: str = "rows"
    blocks: str = "independent"
    resample_every: int | None = 1
    density: float = 0.1
    cap: bool = True
    sketches: int = 1
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        """Refuse impossible hyperparameters."""
        check_sketch(self.sketch, self.normalise, self.blocks)
        check_link(self.side, self.resample_every)
        if not 0 < self.density <= 1:
            raise ConfigError(f"method.density is {self.density}; it must lie in (0, 1]")
        if self.sketches < 1:
            raise ConfigError(f"method.sketches is {self.sketches}; 1 or more is wanted")
        if not 0 < self.server_lr < math.inf:
            raise ConfigError(f"method.server_lr is {self.server_lr}; a positive number is wanted")
        resolve_rank(self.rank, 1, "any layer", cap=True)
        resolve_scale(self.alpha, 1)

    @property
    @override
    def traits(self) -> Traits:
        merges = self.resample_every is not None
        ranks = self.sketches == 1  # else a client's components are those of its group
        return Traits(exact=True, linear=True, merges=merges, ranks=ranks, step=self.server_lr)

    @override
    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        del draw
        ranks = [self._rank(plan, name) for name in plan.targets]
        notes = tuple(r.note for r in ranks if r.note is not None)
        return State(base, plan, memo=dict(FIRST_LINK), notes=notes)

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        ranks = cohort.ranks
        if self.sketches > 1:
            dealt = generator(draw.seed, "groups", round_).permutation(len(cohort)) % self.sketches
            ranks = torch.tensor([(g, self.sketches) for g in dealt.tolist()], dtype=torch.int64)
        adapters = {}
        for name, view in state.plan.targets.items():
            spec = self.spec(state, name, draw)
            m, n = view.shape
            shape = (m, spec.rank) if spec.side == "right" else (spec.rank, n)
            trained = Trained(shape, state.carried.get(name))
            factors: dict[str, Factor] = (
                {"B": trained, "A": Sketched(spec)}
                if spec.side == "right"
                else {"B": Sketched(spec), "A": trained}
            )
            adapters[name] = Adapter(factors, self._scale(spec))
        return Downlink(adapters, dense_slots(state), ranks=ranks, link=state.memo["sketch"])

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        mean = got.mean()
        dense = dense_means(state, mean, self.server_lr)
        averaged, terms = mean_terms(state, sent, mean, self.server_lr)
        memo = next_link(state.memo, self.resample_every)
        ends = memo["age"] == 0
        carried = {} if ends else {n.rpartition("/")[0]: t for n, t in averaged.items()}
        link = Link(terms if ends else {}, dense)
        base = apply_link(state.base, link, state.plan)
        return replace(state, base=base, carried=carried, memo=memo, link=link, report={}, notes=())

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        del own
        if not state.carried:
            return state.base
        terms = {}
        for name, trained in state.carried.items():
            spec = self.spec(state, name, draw)
            pair = (trained, spec) if spec.side == "right" else (spec, trained)
            terms[name] = Term(pair, self._scale(spec))
        return apply_link(state.base, Link(terms), state.plan)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        trained = 0
        for name, view in plan.targets.items():
            kept = view.shape[0 if draws_right(self.side, plan, name) else 1]
            trained += self._rank(plan, name).value * kept
        up = trained + dense_floats(plan)
        age = (round_ - 1) % self.resample_every if self.resample_every else round_ - 1
        return up, trained * self.sketches if age else 0

    def spec(self, state: State, name: str, draw: Draw) -> SketchSpec:
        """Give the sketch of one layer that is in force in ``state``."""
        right = draws_right(self.side, state.plan, name)
        return SketchSpec(
            kind=self.sketch,
            side="right" if right else "left",
            rank=self._rank(state.plan, name).value * self.sketches,
            dim=state.plan.targets[name].shape[1 if right else 0],
            seed=draw.sketch_seed(name),
            index=state.memo["sketch"],
            blocks=self.blocks,
            normalise=self.normalise,
            density=self.density,
        )

    def _rank(self, plan: Plan, name: str) -> Rank:
        return drawn_rank(self.rank, self.side, plan, name, cap=self.cap, parts=self.sketches)

    def _scale(self, spec: SketchSpec) -> float:
        return resolve_scale(self.alpha, spec.rank // self.sketches)
