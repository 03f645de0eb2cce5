"""FedKSeed: zeroth-order local steps along K random directions that serve the whole run.

    W_t = W_0 + sum_j C_j z_j,  z_1 .. z_K drawn from a seed, C = 0 at the start
    client i: each step: j drawn with replacement,  g = (L(W + eps z_j) - L(W - eps z_j)) / (2 eps)
              c_ij <- c_ij - lr g,   W <- W - lr g z_j
    server:   C_j <- C_j + sum_i p_i c_ij

With ``pro``, j is drawn with probabilities softmax(minmax(mean |step| along j so far)); each mean
starts with one zero.

- Uplink: K numbers per client, the sums c_i. With ``steps`` tau numbers, one per local step, in the
  order in which the directions were drawn; server and client draw the same order from the client,
  the round and the seed. A client whose ``local.epochs`` have fewer than tau steps sends zeros for
  the remaining ones.
- Downlink: a seed, and the K numbers of C, however many rounds the client missed. With ``pro`` also
  the probabilities.
- Aggregation: exact; linear if sums are sent.
- Server and clients: K d draws per round to compute W_t from W_0. Client: 2 forward passes per
  local step, no backward pass.
- Source: Qin et al., *Federated full-parameter tuning of billion-sized language models with
  communication cost under 18 kilobytes*, ICML 2024, arXiv 2312.06353, and its code (FederatedScope,
  branch ``FedKSeed``).
- Held to: alibaba/FederatedScope at d7e07487: whole rounds with training, plain and Pro, 3 rounds.
- Departures: clients send steps instead of the differences g. The code multiplies the sums of all
  rounds by one lr, which must then be constant. z is drawn on the CPU in one precision, W_t is
  computed in float64 and rounded once, and measuring along z does not change W. In the code CPU and
  GPU draw different z, and adding +eps, -2 eps and +eps leaves rounding errors in W. Weight decay
  is refused: the code decays K times per rebuild instead of tau times. The server draws the
  directions itself, so that a step is sent without its seed (half of the paper's 8 bytes). ``pro``
  uses the steps as sent and clips none (the code clips g at 1000). It needs ``steps``, since sums
  do not contain single steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.limits import Count, Limited, Positive
from fedraclora.protocol.link import Terms
from fedraclora.protocol.method import Draw, Link, Plan, RoundInstructions, State, Traits
from fedraclora.protocol.program import ClientChunk, ClientProgram
from fedraclora.protocol.uplinks import Uplinks, weighted_sum
from fedraclora.rng import cohort_bits, hash_key
from fedraclora.strategies.shared.walking import (
    MOVES,
    DirectionMethod,
    DirectionSet,
    FiniteDifferences,
    check_walk,
    stored,
)
from fedraclora.tree import Tree, parameters, wide
from fedraclora.wire.fields import whole_number

SUMS = "seeds/sums"  # what stands beside base weights: the numbers of all rounds, by direction
CHANCES = "seeds/chances"  # with which clients draw each direction
HISTORY = "seeds/lengths", "seeds/visits"  # of `pro`: sums of |step| and their number, [K]


def rebuilt_weights(base: Mapping[str, torch.Tensor], walk: DirectionSet) -> Tree:
    """Compute the weights of a round, W_t, from the initial weights and the K numbers."""
    return parameters({**base, **replace(walk, scalars=base.get(SUMS)).taken(base)})


@dataclass(frozen=True)
class StoredCoefficients(ClientProgram, group="method"):
    """Keep the K numbers of the run beside base weights that do not change.

    Attributes:
        walk: The directions.
    """

    name = "fedkseed.weights"
    plain = True

    walk: DirectionSet

    @override
    def check(self, downlink: RoundInstructions) -> None:
        check_walk(self.walk)

    @override
    def fold(self, base: Mapping[str, torch.Tensor], plan: Plan) -> tuple[Tree, Terms]:
        return rebuilt_weights(base, self.walk), {}

    @override
    def initial_part(self) -> ClientProgram:
        return self


@dataclass(frozen=True)
class ReusedDirections(FiniteDifferences, group="method"):
    """Let clients measure the loss along directions of the whole run, drawn with replacement.

    Attributes:
        seeds: The number of directions.
        round_: The round; the draws depend on it.
        sums: Whether clients send one number per direction; False: one per local step.
    """

    name = "fedkseed"

    seeds: Count
    round_: Count
    sums: bool

    @property
    @override
    def by_direction(self) -> bool:
        return self.sums

    @override
    def check(self, downlink: RoundInstructions) -> None:
        super().check(downlink)
        whole_number(self.round_, "the round of its directions", 1)

    @override
    def fold(self, base: Mapping[str, torch.Tensor], plan: Plan) -> tuple[Tree, Terms]:
        return rebuilt_weights(base, self.walk), {}

    @override
    def initial_part(self) -> ClientProgram:
        return StoredCoefficients(self.walk)

    @override
    def choose_directions(
        self, chunk: ClientChunk, base: Tree, size: int, steps: int
    ) -> torch.Tensor:
        looks = steps if self.sums else size
        return self.visited(chunk.clients, looks, chances_in(base, self.seeds))

    def visited(self, clients: torch.Tensor, steps: int, chances: torch.Tensor) -> torch.Tensor:
        """Draw which direction a client takes in each local step, with replacement.

        Args:
            clients: Ids, int64 [A].
            steps: The number of local steps.
            chances: Of the directions, [K], which need not add up to one.

        Returns:
            Indices of directions, int64 [A, steps].
        """
        bits = cohort_bits(hash_key(self.walk.seed, "visited", self.round_), clients.cpu(), steps)
        ends = chances.to("cpu", torch.float64).cumsum(0)
        at = (bits.to(torch.float64) + 0.5) * (2.0**-32 * ends[-1])
        return torch.searchsorted(ends, at, right=True).clamp(max=len(ends) - 1)


@dataclass(frozen=True)
class FedKSeed(Limited, DirectionMethod, group="method"):
    """FedKSeed: steps by forward passes along K directions that serve the whole run.

    Attributes:
        seeds: K, directions of the run.
        steps: tau, the most local steps: each is sent as one number; clients with fewer steps send
            zeros for the rest. None: the sums along all directions are sent.
        eps: Step of the finite difference along a direction.
        pro: Whether to draw directions of longer steps more often (FedKSeed-Pro).
    """

    seeds: Count = 1024
    steps: Count | None = None
    eps: Positive = 5e-4
    pro: bool = False

    @property
    @override
    def most_steps(self) -> int | None:
        return self.steps

    @Feature("method.steps", reads=("method.pro",))
    def _tells_steps(self) -> bool:
        return self.steps is not None

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=True, linear=self.steps is None, merges=False, varies=True)

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = super().initial_state(base, plan, draw)
        none = torch.zeros(0, dtype=wide(next(iter(base.values())).dtype))
        if not self.pro:
            return replace(state, base=state.base | {SUMS: none})
        blank = {name: torch.zeros(self.seeds, dtype=torch.float64) for name in HISTORY}
        return replace(state, base=state.base | {SUMS: none, CHANCES: none}, carried=blank)

    @override
    def shape(self, plan: Plan) -> tuple[int, ...]:
        return (self.steps or self.seeds,)

    @override
    def program(self, walk: DirectionSet, round_: int) -> ReusedDirections:
        return ReusedDirections(walk, self.eps, 1, self.seeds, round_, sums=self.steps is None)

    @override
    def walk(self, plan: Plan, round_: int, draw: Draw) -> DirectionSet:
        return super().walk(plan, 1, draw)

    @override
    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        change, carried, values = (
            uplinks.mean() if self.steps is None else {},
            state.carried,
            Tree(),
        )
        total = change.get(MOVES)
        if total is None:
            chances, steps = chances_in(state.base, self.seeds), uplinks.rows()
            program = cast(ReusedDirections, sent.program)
            at = program.visited(uplinks.clients, steps.shape[1], chances)
            each = torch.zeros(len(steps), self.seeds, dtype=torch.float64)
            each.scatter_add_(1, at, steps.to("cpu", torch.float64))
            total = weighted_sum(each, uplinks.weights, uplinks.places) / uplinks.total
            if self.pro:
                carried = history(state.carried, at, steps.to("cpu", torch.float64))
                values[CHANCES] = stored(chances_of(*(carried[name] for name in HISTORY)), state)
        sums = state.base[SUMS]
        before = sums.double() if sums.numel() else torch.zeros(self.seeds, dtype=torch.float64)
        values[SUMS] = stored(before + total, state)
        base = state.base | values
        return replace(state, base=base, link=Link(dense=values), carried=carried, notes=())

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        return rebuilt_weights(state.base, self.walk(state.plan, 1, draw))


def chances_in(base: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
    """Return the probabilities of the directions stored beside base weights; equal at the start."""
    known = base.get(CHANCES, torch.zeros(0))
    return known if known.numel() else torch.ones(count)


def history(carried: Tree, at: torch.Tensor, steps: torch.Tensor) -> Tree:
    """Add steps to the histories of their directions; a step that was not taken is zero."""
    count = len(carried[HISTORY[0]])
    taken = steps.abs(), (steps != 0).double()
    more = (
        torch.zeros(count, dtype=torch.float64).index_add_(0, at.flatten(), t.flatten())
        for t in taken
    )
    return {name: carried[name] + new for name, new in zip(HISTORY, more, strict=True)}


def chances_of(lengths: torch.Tensor, visits: torch.Tensor) -> torch.Tensor:
    """Compute softmax(minmax(mean length)), where each mean starts with one zero."""
    mean = lengths / (visits + 1)
    span = mean.max() - mean.min()
    return torch.softmax((mean - mean.min()) / span if span else mean, dim=0)
