"""DeComFL: zeroth-order local steps, by differences of losses along shared random directions.

    client i: in local steps k = 1..K, for p = 1..P:
              g_kp = (L(W + eps z_kp) - L(W - eps z_kp)) / (2 eps),   c_kp = -lr g_kp / P
              W_i <- W_i + sum_p c_kp z_kp,  the z of all (round, k, p) drawn from one seed
    server:   W <- W + sum_k sum_p (sum_i p_i c_ikp) z_kp

With ``momentum``, clients and server compute V <- momentum V + sum_p c_kp z_kp and W <- W + V. V
is kept over rounds; every replica stores it beside the weights.

- Uplink: K P numbers per client.
- Downlink: a seed, and K P numbers and a seed for each round that the client missed, with which the
  client repeats the steps of that round. All weights (with V) are sent instead if they are smaller.
- Aggregation: exact and linear, because all clients use the same directions.
- Server, and each client that missed rounds: K P d draws per missed round, for d weights in all.
- Client: 2 P forward passes per local step, no backward pass; K P d draws.
- Source: Li et al., *Achieving dimension-free communication in federated learning via zeroth-order
  optimization*, ICLR 2025, arXiv 2405.15861, and its code (``cezo_fl``).
- Held to: ZidongLiu/DeComFL at 0c426e6: whole rounds with training and catch-up, 3 rounds.
- Departures: clients send the step c instead of the difference g, so that the server needs no step
  size. Under a learning rate schedule V therefore sums the steps as they were taken (torch
  multiplies V by the current step size). The mean has the run's aggregation weights; the code's is
  ``aggregation_weights=uniform``. Weight decay is refused: the code's decay (1e-5) is applied in
  replayed steps of the server. The difference is central; the code also has a forward one. One
  seed is sent per round; the code sends K. K is an upper bound: a client whose ``local.epochs``
  have fewer steps sends zeros for the remaining ones, and its V does not change in them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from typing_extensions import override

from fedraclora.limits import Count, Fraction, Limited, Positive
from fedraclora.protocol.method import Draw, Plan, Traits
from fedraclora.strategies.shared.walking import DirectionMethod, DirectionSet, FiniteDifferences


@dataclass(frozen=True)
class FreshDirections(FiniteDifferences, group="method"):
    """Let clients measure the loss along each direction once, and send one number per direction."""

    name = "decomfl"


@dataclass(frozen=True)
class DeComFl(Limited, DirectionMethod, group="method"):
    """DeComFL: zeroth-order steps along shared directions; only scalars are sent, both ways.

    Attributes:
        steps: K, the most local steps; clients with fewer send zeros for the rest.
        directions: P, directions of each local step.
        eps: Step of the finite difference along a direction (the code's mu).
        momentum: Momentum of the steps, kept over rounds; local.momentum must be 0.
    """

    traits = Traits(exact=True, linear=True, merges=True, varies=True)

    steps: Count = 1
    directions: Count = 10
    eps: Positive = 1e-3
    momentum: Fraction = 0.0

    @property
    @override
    def most_steps(self) -> int | None:
        return self.steps

    @override
    def shape(self, plan: Plan) -> tuple[int, ...]:
        return self.steps, self.directions

    @override
    def program(self, walk: DirectionSet, round_: int) -> FreshDirections:
        return FreshDirections(walk, self.eps, self.directions)

    @override
    def walk(self, plan: Plan, round_: int, draw: Draw) -> DirectionSet:
        return replace(super().walk(plan, round_, draw), momentum=self.momentum)
