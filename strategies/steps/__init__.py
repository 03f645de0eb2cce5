"""List the steps that a round may have besides its method, one step per file.

A step is a `strategies.server.round_step.RoundStep` and overrides the hooks that it needs. `STEPS`
is the table of all steps: their order, and the config key that chooses each. The first of a list is
`compatible`, which refuses incompatible features. The strategy knows the hooks, and none of the
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedraclora.aggregation.base import Mean
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.secagg import SecAgg
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.strategies.steps.compatible import CompatibilityCheck
from fedraclora.strategies.steps.fedopt import OptimisedServer
from fedraclora.strategies.steps.local import (
    RowMoments,
    SampleAccount,
    WithoutGradientFigures,
    follows_gradient,
)
from fedraclora.strategies.steps.private import PrivateRounds
from fedraclora.strategies.steps.robust import Attackers, RobustRule
from fedraclora.strategies.steps.scaffold import ControlVariates
from fedraclora.strategies.steps.secure import SecureSum
from fedraclora.training.extras.settings import SampleLevel

# In the order in which updates pass them, also that of the ledger's columns: a config key, and the
# step for its value.
STEPS: tuple[tuple[str, Callable[[Any], RoundStep | None]], ...] = (
    ("local", lambda local: None if follows_gradient(local) else WithoutGradientFigures()),
    ("attack", lambda it: Attackers(it) if it.share or it.colludes else None),
    ("aggregator", lambda rule: None if isinstance(rule, Mean) else RobustRule(rule)),
    ("privacy", lambda it: PrivateRounds(it) if isinstance(it, ClientLevel) else None),
    ("secure", lambda it: SecureSum(it) if isinstance(it, SecAgg) else None),
    ("local", lambda it: SampleAccount(dp.noise) if (dp := it.extra_of(SampleLevel)) else None),
    ("local", lambda local: RowMoments() if local.optimizer_state == "rows" else None),
    ("control_variates", lambda on: ControlVariates() if on else None),
    ("server_optimizer", lambda rule: None if rule.name == "none" else OptimisedServer(rule)),
)


def round_steps(chosen: Mapping[str, Any], own: Sequence[RoundStep] = ()) -> list[RoundStep]:
    """List the steps of a run; keys that are not chosen give none.

    Args:
        chosen: Settings by key of the config; a missing key chooses none.
        own: A program's own steps.
    """
    steps = [step for step in own if step.first]
    for key, make in STEPS:
        if key in chosen and (step := make(chosen[key])) is not None:
            step.settings = chosen[key]
            steps.append(step)
    steps += (step for step in own if not step.first)
    return [CompatibilityCheck(steps), *steps]
