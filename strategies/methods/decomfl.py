"""DeComFL: zeroth-order local steps, by differences of losses along shared random directions.

    client i: in local steps k = 1..K, for p = 1..P:
              g_kp = (L(W + eps z_kp) - L(W - eps z_kp)) / (2 eps),   c_kp = -lr g_kp / P
              W_i <- W_i + sum_p c_kp z_kp,  the z of all (round, k, p) drawn from one seed
    server:   W <- W + sum_k sum_p (sum_i p_i c_ikp) z_kp

With ``momentum``, V <- momentum V + sum_p c_kp z_kp and W <- W + V, at clients and at the server; V
goes on from round to round, and stands beside the weights at every replica.

- Uplink: K P numbers per client. Downlink: a seed, and for each round that the client missed K P
  numbers and a seed, by which it takes the same steps; or all weights, with V, where that is less.
- Aggregation: exact and linear: directions are common.
- Server and each client that was away: K P d draws a missed round, d the number of all weights.
- Client: 2 P forward passes a local step, no backward pass; K P d draws.
- Source: Li et al., *Achieving dimension-free communication in federated learning via zeroth-order
  optimization*, ICLR 2025, arXiv 2405.15861, and its code (``cezo_fl``).
- Departures: what is sent is the step c, and not g, so that the server needs no step size, and
  under a schedule V holds the steps as they were taken (torch multiplies V by the step size of
  now). The mean has the run's ``weights``; the code's is ``aggregation_weights=uniform``. Weight
  decay is
  refused: the code's 1e-5 is a replayed step of the server. The difference is central; the code has
  a forward one as well. A seed a round is sent, where the code sends K. K is an upper bound: a
  client whose ``local.epochs`` are fewer steps sends zeros for the rest, and its V stands still.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from typing_extensions import override

from fedraclora.limits import Count, Fraction, Limited, Positive
from fedraclora.protocol.method import Draw, Plan, Traits
from fedraclora.strategies.shared.walking import LookAlong, Walk, Walking


@dataclass(frozen=True)
class LookOnce(LookAlong, group="method"):
    """Let clients look along each direction once, and send a number for each."""

    name = "decomfl"


@dataclass(frozen=True)
class DeComFl(Limited, Walking, group="method"):
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
    def program(self, walk: Walk, round_: int) -> LookOnce:
        return LookOnce(walk, self.eps, self.directions)

    @override
    def walk(self, plan: Plan, round_: int, draw: Draw) -> Walk:
        return replace(super().walk(plan, round_, draw), momentum=self.momentum)
