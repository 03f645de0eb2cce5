"""What happens to updates between the checks of an exchange and the method."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from fedraclora.aggregate import Uplinks
from fedraclora.aggregator import Aggregator, Mean, Setting, rows_of
from fedraclora.attack import Attack
from fedraclora.method import Cohort, Method
from strategies.loop import LoopConfig
from strategies.rows import Row


@dataclass
class Treatment:
    """The attack of a simulation, then the aggregator.

    Attributes:
        aggregator: What the method sees of the updates.
        attack: What some clients do to harm the run.
        attackers: Their ids, int64; drawn by `begin`.
    """

    aggregator: Aggregator = field(default_factory=Mean)
    attack: Attack = field(default_factory=Attack)
    attackers: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def begin(self, method: Method, loop: LoopConfig) -> None:
        """Refuse what cannot be together, and draw who attacks.

        Raises:
            ConfigError: Saying why.
        """
        self.aggregator.check(method.traits, loop.cohort)
        self.attackers = self.attack.attackers(loop.seed, loop.clients)

    def sums_are_enough(self, method: Method) -> bool:
        """Tell whether nobody looks at a single client's update."""
        traits = method.traits
        looks = traits.looks_at_clients or self.aggregator.individuals or self.attack.colludes
        return traits.linear and not looks

    def treat(self, got: Uplinks, setting: Setting) -> Uplinks:
        """Give what the method sees of what came."""
        if self.attack.colludes:
            agreed = self.attack.colluded(rows_of(got), torch.isin(got.clients, self.attackers))
            got = replace(got, stacked=agreed)
        return self.aggregator(got, setting)

    def columns(self, cohort: Cohort) -> Row:
        """What the ledger says of a round: how many of the cohort attack, if anybody may."""
        if not self.attack.share:
            return {}
        return {"attackers": int(torch.isin(cohort.clients, self.attackers).sum())}
