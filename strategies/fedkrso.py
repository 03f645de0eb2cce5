"""FedKRSO: local steps in several shared random subspaces, one after another.

    P_j (r x n) drawn once for j = 1..G
    client k: B_jk = 0; local step t moves B_jk for j = (t // interval) mod G alone, under the
    effective weight W + s sum_j B_jk P_j
    W <- W + s sum_j (sum_k p_k B_jk) P_j

- Uplink: G r m numbers per matrix and client. Downlink: a seed, and what the client missed: G r m
  numbers per link, at most m n.
- Aggregation: exact and linear: the subspaces are the same everywhere.
- Server: one mean and a merge of 2 m n G r operations.
- Source: *FedKRSO*, INFOCOM 2026, arXiv 2602.03019.
- Departures: the rows of all P_j are one drawing, of unit length in expectation; the paper has
  E[P_j^T P_j] = I (``normalise=identity``), whose stable steps are n / r times smaller. Under
  momentum or weight decay a subspace goes on moving after its turn. A turn that no local step
  reaches (G times the interval above the steps of a client) leaves zeros, which are sent.
- Unverified: only the abstract and a summary were read: the number of subspaces, how clients
  choose among them, the interval, and whether they are ever drawn anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from typing_extensions import override

from fedraclora.aggregate import Uplinks
from fedraclora.errors import ConfigError
from fedraclora.method import Cohort, Downlink, Draw, Plan, State, Traits
from fedraclora.sketch import SketchSpec
from strategies.shared.asymmetric import Asymmetric
from strategies.shared.common import close_by_means, dense_floats, dense_slots


@dataclass(frozen=True)
class FedKrso(Asymmetric):
    """Hyperparameters of FedKRSO.

    Attributes:
        rank: r, of one subspace; a fraction (0, 1] of n / G if written with a dot.
        alpha: Numerator of the scale s = alpha / r, or ``auto`` (s = 1).
        rslora: Scale s = alpha / sqrt(r) instead.
        sketch: How the P_j are drawn, a key of `fedraclora.sketch.SKETCHES`.
        normalise: ``rows``, ``identity`` (of each P_j) or ``none`` (`fedraclora.sketch`).
        cap: Cut the rank at n / G, with a note; False refuses it.
        sketches: G.
        interval: Local steps of a turn.
    """

    sketch: str = "gaussian"
    sketches: int = 2
    interval: int = 1

    @override
    def __post_init__(self) -> None:
        """Refuse impossible hyperparameters."""
        super().__post_init__()
        if self.interval < 1:
            raise ConfigError(f"method.interval is {self.interval}; 1 or more is wanted")

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=True, linear=True, merges=True)

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        del round_, cohort
        return Downlink(
            self.adapters(state, draw),
            dense_slots(state),
            recipe="in_turn",
            arguments={"parts": self.sketches, "interval": self.interval},
            link=state.memo["sketch"],
        )

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        return close_by_means(state, sent, got.mean(), 1)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        del round_
        return self.trained_numbers(plan) * self.sketches + dense_floats(plan), 0

    @override
    def spec(self, state: State, name: str, draw: Draw) -> SketchSpec:
        return replace(super().spec(state, name, draw), index=0)  # the P_j are drawn once
