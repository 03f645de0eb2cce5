"""Bernoulli-LoRA, federated: a random draw in each round decides which factor is trained.

    c_t = 1 with probability p, the same for all clients
    c_t = 1: B_t drawn, client k: trains A_k from 0;  W <- W + s B_t sum_k p_k A_k
    c_t = 0: A_t drawn, client k: trains B_k from 0;  W <- W + s (sum_k p_k B_k) A_t

- Uplink: r n numbers per matrix and client if c_t = 1, r m if c_t = 0.
- Downlink: a seed, and the updates that the client missed. One update has as many numbers as one
  client sent in that round; all of them together have at most m n.
- Aggregation: exact and linear, as in Fed-RAC-LoRA: each round is a round of Fed-RAC-LoRA.
- Server: one mean and a merge of 2 m n r operations.
- Source: Sokolov et al., *Bernoulli-LoRA: a theoretical framework for randomized low-rank
  adaptation*, 2025, arXiv 2508.03820.
- Departures: clients take local steps; the paper's federated versions take one gradient per round.
  The paper's gradient estimators (PAGE, MVR, QGD, MARINA, EF21) are left out. The draws c_t have
  their own seed, so that the bytes of a round are known before the run. Sketches are orthonormal by
  default. In the authors' code of one client, which we read
  (IgorSokoloff/Bernoulli-LoRA_experiments at 4d9fdb0), c_t is drawn and each step projected as
  here: one step of ``local.precondition=true`` is that of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from typing_extensions import override

from fedraclora.limits import Share
from fedraclora.protocol.method import Cohort, Draw, Plan, RoundInstructions, State, Traits
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator
from fedraclora.sketch import Normalize, Sketch
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.shared.layerwise import LowRankMethod
from fedraclora.tree import Tree


@dataclass(frozen=True)
class BernoulliLora(LowRankMethod):
    """Bernoulli-LoRA: a random draw in each round decides which factor is trained.

    Attributes:
        sketch: A key of `fedraclora.sketch.SKETCHES`.
        normalize: ``rows``, ``identity`` or ``none`` (`fedraclora.sketch`).
        probability: p, the chance that B is drawn and A trained; with m / (m + n) both outcomes
            cost the same on average.
        coins: Seed of these draws.
    """

    traits = Traits(exact=True, linear=True, merges=True, ranks=True, varies=True)
    link_rounds = 1  # a coin is thrown for each

    sketch: Sketch = "orthonormal"
    normalize: Normalize = "rows"
    probability: Share = 0.5
    coins: int = 0

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        self.round_method(1)

    def round_method(self, round_: int) -> FedRacLora:
        """Return the method of one round: Fed-RAC-LoRA, training the factor that the draw names."""
        left = generator(self.coins, "coin", round_).random() < self.probability
        return self.training("A" if left else "B")

    def training(self, label: str) -> FedRacLora:
        """Build Fed-RAC-LoRA that trains one of the two factors."""
        shared = {f.name for f in fields(FedRacLora)} & vars(self).keys()
        return FedRacLora(train=label, **{name: getattr(self, name) for name in shared})

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        chances = {"A": self.probability, "B": 1 - self.probability}
        states = [
            self.training(s).initial_state(base, plan, draw)
            for s, chance in chances.items()
            if chance
        ]
        notes = dict.fromkeys(note for state in states for note in state.notes)
        return replace(states[0], notes=tuple(notes))

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        return self.round_method(round_).open_round(state, round_, cohort, draw)

    @override
    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        return self.round_method(1).close_round(
            state, sent, uplinks
        )  # the side is read off ``sent``

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        return self.round_method(round_).floats(plan, 1)
