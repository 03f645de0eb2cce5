"""What does not go together: one table, for the errors and for the page that prints it.

``conflicts.yaml`` says of pairs of `strategies.steps.features` why they do not go together; what to
take instead the features say. A pair is looked at before the first round, and in each round where
what is sent may change; some are refused by the step that comes upon them when it computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from typing_extensions import override

from fedraclora.aggregation.base import AggregationContext
from fedraclora.errors import ConfigError, unknown
from fedraclora.protocol.method import Cohort, Downlink, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.server.round_step import RoundStep, step_name
from fedraclora.strategies.steps.features import FEATURES, IN_ROUNDS, Setup


@dataclass(frozen=True)
class Conflict:
    """Two things that do not go together.

    Attributes:
        what, beside: Their names, keys of `FEATURES`.
        why: The reason.
    """

    what: str
    beside: str
    why: str

    @property
    def in_rounds(self) -> bool:
        """Return whether it may come up in any round."""
        return self.what in IN_ROUNDS or self.beside in IN_ROUNDS

    @property
    def instead(self) -> str:
        """What to take: something else than the one, or than the other."""
        return f"{FEATURES[self.beside].other}, or {FEATURES[self.what].other}"

    def check(self, setup: Setup) -> None:
        """Reject a run that has both.

        Raises:
            ConfigError: Saying why, and what to take.
        """
        one, other = FEATURES[self.what], FEATURES[self.beside]
        if (what := one.found(setup)) and (beside := other.found(setup)):
            raise self.error(what, beside)

    def error(self, *found: bool | str) -> ConfigError:
        """Build the error; ``found`` are the values that were met, where there are several."""
        met = ", ".join(value for value in found if isinstance(value, str))
        return ConfigError(
            f"{self.what} does not go with {self.beside}{met and f' ({met})'}: {self.why}; "
            f"take {self.instead}"
        )


# Names that steps use which come upon one of them.
TWICE, ROW_MOMENTS = "a method that asks twice in a round", "local.moments=rows"
SECURE, PRIVATE, VARIATES = "secure=secagg", "privacy=client_level", "control_variates=true"
ADAPTIVE = "an adaptive server_optimiser with space=factors"

TABLE = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
WHY: dict[str, dict[str, str]] = yaml.safe_load(TABLE)
CONFLICTS = tuple(
    Conflict(what, beside, why) for what, row in WHY.items() for beside, why in row.items()
)


IN_EACH_ROUND = tuple(row for row in CONFLICTS if row.in_rounds)


def refused(what: str, beside: str, found: bool | str = True) -> ConfigError:
    """Build the error of a pair that a step has come upon; ``found`` names the value."""
    return Conflict(what, beside, WHY[what][beside]).error(found)


class Fits(RoundStep):
    """Refuses what does not go together, before the first round and in each.

    Args:
        steps: All others.
    """

    def __init__(self, steps: Sequence[RoundStep]) -> None:
        self.steps = steps
        self.sent: Downlink | None = None  # what was looked at last

    @override
    def begin(self, state: State) -> None:
        budgets = self.run.devices.system.rank_budget is not None
        ranks = torch.ones(2, dtype=torch.int64) if budgets else None
        some = Cohort(torch.arange(2), torch.ones(2), ranks)
        sent = self.run.method.open_round(state, 1, some, self.run.draw)
        self._check(CONFLICTS, sent)
        setup = Setup(self.steps, self.run, sent)
        for step in self.steps:
            for beside, why in step.avoids.items():
                if beside not in FEATURES:
                    raise unknown(f"feature that {step_name(step)} avoids", beside, FEATURES)
                if FEATURES[beside].found(setup):
                    raise ConfigError(
                        f"the step {step_name(step)} does not go with {beside}: {why}; take "
                        f"{FEATURES[beside].other}, or leave the step out"
                    )

    @override
    def send(self, sent: Downlink, state: State) -> Downlink:
        self._check(IN_EACH_ROUND, sent)
        self.sent = sent
        return sent

    @override
    def treat(self, got: Uplinks, context: AggregationContext) -> Uplinks:
        if context.sent is not self.sent:  # it may be that of a later exchange
            self._check(IN_EACH_ROUND, context.sent)
        return got

    def _check(self, rows: Iterable[Conflict], sent: Downlink) -> None:
        setup = Setup(self.steps, self.run, sent)
        for row in rows:
            row.check(setup)
