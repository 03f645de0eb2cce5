"""FedKSeed: K directions for the whole run; clients look along them by differences of losses.

    W_t = W_0 + sum_j C_j z_j,  z_1 .. z_K drawn from a seed, C = 0 at the start
    client i: each step: j drawn with replacement,  g = (L(W + eps z_j) - L(W - eps z_j)) / (2 eps)
              c_ij <- c_ij - lr g,   W <- W - lr g z_j
    server:   C_j <- C_j + sum_i p_i c_ij

``pro``: j is drawn with the chances softmax(minmax(mean |step| along j so far)), whose histories
begin with one zero.

- Uplink: K numbers per client, the sums c_i; with ``steps`` tau numbers, one a local step, in the
  order in which the directions were drawn: client, round and seed tell which. A client whose
  ``local.epochs`` are fewer than tau steps sends zeros for the rest.
- Downlink: a seed, and C, K numbers, however long the client was away; ``pro``: the chances, too.
- Aggregation: exact; linear where sums are sent.
- Server and clients: K d draws to rebuild W_t from W_0, once a round. Client: 2 forward passes a
  local step, no backward pass.
- Source: Qin et al., *Federated full-parameter tuning of billion-sized language models with
  communication cost under 18 kilobytes*, ICML 2024, arXiv 2312.06353, and its code (FederatedScope,
  branch ``FedKSeed``).
- Departures: the steps are sent, and not g: the code multiplies sums of all rounds by one lr, which
  must then be constant. z is drawn on the CPU in one precision, W is rebuilt in float64 and rounded
  once, and looking along z never changes it; in the code CPU and GPU draw different z, and +eps,
  -2 eps, +eps leaves W elsewhere. Weight decay is refused: the code decays K times a rebuild, not
  tau times. Pairs need no seeds, which halves the paper's 8 bytes a step. ``pro`` looks at the
  steps as sent and clips none (the code clips g at 1000), and needs ``steps``: sums do not tell
  single steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.limits import Count, Limited, Positive
from fedraclora.protocol.method import Downlink, Draw, Link, Plan, State, Traits
from fedraclora.protocol.pool import parameters
from fedraclora.protocol.uplinks import Uplinks, weighted_sum
from fedraclora.protocol.walk import CHANCES, MOVES, SUMS, Walk, chances_in, visited
from fedraclora.strategies.shared.walking import Walking, stored
from fedraclora.tree import Tree, wide

HISTORY = "seeds/lengths", "seeds/visits"  # of `pro`: sums of |step| and their number, [K]


@dataclass(frozen=True)
class FedKSeed(Limited, Walking, group="method"):
    """FedKSeed: steps by forward passes along K directions that serve the whole run.

    Attributes:
        seeds: K, directions of the run.
        steps: tau, the most local steps: each is sent as one number, zeros for those that a
            client's epochs do not give. None: the sums along all directions are sent.
        eps: How far a client looks along a direction.
        pro: Whether directions of longer steps are drawn more often (FedKSeed-Pro).
    """

    seeds: Count = 1024
    steps: Count | None = None
    eps: Positive = 5e-4
    pro: bool = False

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        if self.pro and self.steps is None:
            raise ConfigError(
                "method.pro is true, but sums along directions do not tell single steps; set "
                "method.steps to the local steps of a client"
            )

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=True, linear=self.steps is None, merges=False, varies=True)

    @override
    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = super().init(base, plan, draw)
        none = torch.zeros(0, dtype=wide(next(iter(base.values())).dtype))
        if not self.pro:
            return replace(state, base=state.base | {SUMS: none})
        blank = {name: torch.zeros(self.seeds, dtype=torch.float64) for name in HISTORY}
        return replace(state, base=state.base | {SUMS: none, CHANCES: none}, carried=blank)

    @override
    def shape(self, plan: Plan) -> tuple[int, ...]:
        return (self.steps or self.seeds,)

    @override
    def arguments(self, round_: int) -> dict[str, float | int]:
        pairs = int(self.steps is not None)
        look: dict[str, float | int] = {"eps": self.eps, "directions": 1, "pool": self.seeds}
        return look | {"pairs": pairs, "round": round_}

    @override
    def walk(self, plan: Plan, round_: int, draw: Draw) -> Walk:
        return replace(super().walk(plan, 1, draw), standing=True)

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        change, carried, values = got.mean() if self.steps is None else {}, state.carried, Tree()
        moved = change.get(MOVES)
        if moved is None:
            chances = chances_in(state.base, self.seeds)
            turn, steps = int(sent.arguments["round"]), got.rows()
            at = visited(sent.directions.seed, turn, got.clients, steps.shape[1], chances)
            each = torch.zeros(len(steps), self.seeds, dtype=torch.float64)
            each.scatter_add_(1, at, steps.to("cpu", torch.float64))
            moved = weighted_sum(each, got.weights, got.places) / got.total
            if self.pro:
                carried = history(state.carried, at, steps.to("cpu", torch.float64))
                values[CHANCES] = stored(chances_of(*(carried[name] for name in HISTORY)), state)
        sums = state.base[SUMS]
        before = sums.double() if sums.numel() else torch.zeros(self.seeds, dtype=torch.float64)
        values[SUMS] = stored(before + moved, state)
        base = state.base | values
        return replace(state, base=base, link=Link(dense=values), carried=carried, notes=())

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        return parameters(state.base | self.walk(state.plan, 1, draw).taken(state.base))


def history(carried: Tree, at: torch.Tensor, steps: torch.Tensor) -> Tree:
    """Add steps to the histories of their directions; steps that were not taken are zero."""
    count = len(carried[HISTORY[0]])
    taken = steps.abs(), (steps != 0).double()
    more = (
        torch.zeros(count, dtype=torch.float64).index_add_(0, at.flatten(), t.flatten())
        for t in taken
    )
    return {name: carried[name] + new for name, new in zip(HISTORY, more, strict=True)}


def chances_of(lengths: torch.Tensor, visits: torch.Tensor) -> torch.Tensor:
    """Compute softmax(minmax(mean length)), with one zero in each history."""
    mean = lengths / (visits + 1)
    span = mean.max() - mean.min()
    return torch.softmax((mean - mean.min()) / span if span else mean, dim=0)
