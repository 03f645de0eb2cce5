"""The steps of a round in their order, from the settings of a run."""

from __future__ import annotations

from fedraclora.aggregation.base import Mean
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.secagg import SecAgg
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.strategies.steps.account import SampleAccount
from fedraclora.strategies.steps.attackers import Attackers
from fedraclora.strategies.steps.energy import NoEnergy, follows_gradient
from fedraclora.strategies.steps.fedopt import OptimisedServer
from fedraclora.strategies.steps.fits import Fits
from fedraclora.strategies.steps.private import PrivateRounds
from fedraclora.strategies.steps.robust import RobustRule
from fedraclora.strategies.steps.row_moments import RowMoments
from fedraclora.strategies.steps.scaffold import ControlVariates
from fedraclora.strategies.steps.secure import SecureSum
from fedraclora.strategies.steps.settings import RoundSettings
from fedraclora.training.extras.sample_level import SampleLevel
from fedraclora.training.localconfig import LocalConfig


def round_steps(chosen: RoundSettings, local: LocalConfig) -> list[RoundStep]:
    """List the steps of a run; what was not chosen is no step.

    Args:
        chosen: What was.
        local: Local settings, of which some leave traces at the server.

    Returns:
        In the order in which updates pass them. Columns of the ledger follow it, too.
    """
    steps: list[RoundStep] = [Fits(chosen)]
    if not follows_gradient(local):
        steps.append(NoEnergy())
    if chosen.attack.share or chosen.attack.colludes:
        steps.append(Attackers(chosen.attack))
    if not isinstance(chosen.aggregator, Mean):
        steps.append(RobustRule(chosen.aggregator))
    if isinstance(chosen.privacy, ClientLevel):
        steps.append(PrivateRounds(chosen.privacy, chosen.secret))
    if isinstance(chosen.secure, SecAgg):
        steps.append(SecureSum(chosen.secure))
    if (level := local.extra_of(SampleLevel)) is not None:
        steps.append(SampleAccount(level.noise))
    if local.moments == "rows":
        steps.append(RowMoments())
    if chosen.control_variates:
        steps.append(ControlVariates())
    if chosen.server_optimiser.name != "none":
        steps.append(OptimisedServer(chosen.server_optimiser))
    return steps
