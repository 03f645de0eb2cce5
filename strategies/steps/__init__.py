"""What may happen to a round besides its method, one step in one file.

A step is a `strategies.server.round_step.RoundStep` and overrides the hooks that it needs. Its
class says by which key of the config it is chosen; `STEPS` is the table of them all. `conflicts` is
the table of what does not go together. The strategy knows the hooks and none of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.strategies.steps.account import SampleAccount
from fedraclora.strategies.steps.attackers import Attackers
from fedraclora.strategies.steps.conflicts import Fits
from fedraclora.strategies.steps.energy import NoEnergy
from fedraclora.strategies.steps.fedopt import OptimisedServer
from fedraclora.strategies.steps.private import PrivateRounds
from fedraclora.strategies.steps.robust import RobustRule
from fedraclora.strategies.steps.row_moments import RowMoments
from fedraclora.strategies.steps.scaffold import ControlVariates
from fedraclora.strategies.steps.secure import SecureSum

# In the order in which updates pass them; columns of the ledger follow it, too.
STEPS: tuple[type[RoundStep], ...] = (
    NoEnergy,
    Attackers,
    RobustRule,
    PrivateRounds,
    SecureSum,
    SampleAccount,
    RowMoments,
    ControlVariates,
    OptimisedServer,
)


def round_steps(chosen: Mapping[str, Any], own: Sequence[RoundStep] = ()) -> list[RoundStep]:
    """List the steps of a run; what was not chosen is no step.

    Args:
        chosen: Settings by key of the config, ``local`` among them.
        own: Steps of a program's own.
    """
    made = [step for kind in STEPS if (step := kind.of(chosen)) is not None]
    steps = [*(s for s in own if s.first), *made, *(s for s in own if not s.first)]
    return [Fits(steps), *steps]
