"""What a run may have that something else does not go with: settings, methods, and what is sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedraclora.aggregation.base import Mean
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.secagg import LEAST, SecAgg
from fedraclora.protocol.change_of_basis import held_beside
from fedraclora.protocol.method import Downlink, Traits
from fedraclora.protocol.recipes import RECIPES, Recipe
from fedraclora.training.localconfig import LocalConfig
from strategies.server.round_step import RunContext
from strategies.steps.settings import RoundSettings
from strategies.wrappers.allocated import Allocated
from strategies.wrappers.pruned import Pruned


@dataclass(frozen=True)
class Setup:
    """A run, and what is asked in one of its rounds.

    Attributes:
        chosen: The settings of the steps.
        run: The run.
        sent: What is asked.
    """

    chosen: RoundSettings
    run: RunContext
    sent: Downlink

    @property
    def traits(self) -> Traits:
        """Those of the method."""
        return self.run.method.traits

    @property
    def recipe(self) -> Recipe:
        """What clients do with what is sent."""
        return RECIPES[self.sent.recipe]

    @property
    def rule(self) -> str:
        """Name the aggregator in the place of the mean; empty: there is none."""
        rule = self.chosen.aggregator
        return "" if isinstance(rule, Mean) else f"aggregator={rule.name}"

    @property
    def colluding(self) -> str:
        """Name an attack whose clients know each other's updates; empty: there is none."""
        attack = self.chosen.attack
        return f"attack={attack.name}" if attack.colludes else ""

    @property
    def max_weight(self) -> int:
        """The greatest weight of a client in a secure sum; 0: there is none."""
        return self.chosen.security.max_weight if isinstance(self.chosen.security, SecAgg) else 0


def _moments(local: LocalConfig) -> str:
    """Name the setting that hands moments on."""
    if local.moments_kept:
        return f"local.moments_kept is {local.moments_kept}"
    return "local.moments is run" if local.moments == "run" else ""


def _beside_plain_sgd(local: LocalConfig) -> str:
    """Name a setting from whose steps the mean gradient cannot be told."""
    beside = {
        "optimiser": local.optimiser != "sgd",
        "momentum": local.momentum,
        "weight_decay": local.weight_decay,
        "clip": local.clip is not None,
        "dp": local.dp is not None,
        "prox": local.prox,
        "precondition": local.precondition,
        "adjust": local.adjust != "none",
        "gate_penalty": local.gate_penalty is not None,
    }
    return next((f"local.{n} is {getattr(local, n)}" for n, used in beside.items() if used), "")


def _no_mean_gradient(sent: Downlink) -> str:
    """Name what keeps a round from having one mean gradient."""
    if sent.apart:
        return "other factors for each client"
    return "" if sent.recipe == "plain" else f"the recipe {sent.recipe}"


def _begins_anew(sent: Downlink) -> str:
    """Name a weight whose trained factor has no frozen one beside it; empty: there is none."""
    return next((n for n, a in sent.adapters.items() if held_beside(a) is None), "")


# Each tells whether a run has it, or names the value that it has; empty: it has not.
Feature = Callable[[Setup], bool | str]
SETTINGS: dict[str, Feature] = {
    "engine=deploy": lambda s: s.run.loop.guarded,
    "an attack": lambda s: s.chosen.attack.share > 0 and f"attack={s.chosen.attack.name}",
    "an attack whose clients collude": lambda s: s.colluding,
    "a rule or an attack that looks at single updates": (
        lambda s: s.rule if s.chosen.aggregator.individuals else s.colluding
    ),
    "another aggregator than mean": lambda s: s.rule,
    "a robust rule": lambda s: s.chosen.aggregator.individuals and s.rule,
    "a rule that makes one vector of a cohort": lambda s: s.chosen.aggregator.estimates and s.rule,
    "a rule that compares clients": lambda s: s.chosen.aggregator.compares and s.rule,
    "privacy=client_level": lambda s: isinstance(s.chosen.privacy, ClientLevel),
    "privacy.quantile": lambda s: getattr(s.chosen.privacy, "quantile", None) is not None,
    "secure=secagg": lambda s: s.max_weight > 0,
    "secure.max_weight=1": lambda s: s.max_weight == 1,
    "secure.max_weight above 1": lambda s: s.max_weight > 1 and f"it is {s.max_weight}",
    "weights=uniform": lambda s: s.run.loop.weights == "uniform",
    "weights=examples": lambda s: s.run.loop.weights == "examples",
    "a cohort of two or less": lambda s: s.run.loop.cohort < LEAST and f"it is {s.run.loop.cohort}",
    "control_variates=true": lambda s: s.chosen.variates,
    "server_optimiser.space=weights": (
        lambda s: s.chosen.optimiser.name != "none" and s.chosen.optimiser.space == "weights"
    ),
    "server_optimiser.space=factors": lambda s: s.chosen.optimiser.space == "factors",
    "an adaptive server_optimiser with space=factors": (
        lambda s: s.chosen.optimiser.adapts and s.chosen.optimiser.space == "factors"
    ),
    "system": lambda s: s.run.devices.enabled,
    "system.buffer": lambda s: s.run.devices.system.buffer is not None,
    "local moments that live on": lambda s: _moments(s.run.local),
    "local.weight_decay": lambda s: s.run.local.weight_decay > 0 and str(s.run.local.weight_decay),
    "local epochs in the place of steps": lambda s: not s.run.local.steps,
    "local steps that are not plain SGD": lambda s: _beside_plain_sgd(s.run.local),
}
METHODS: dict[str, Feature] = {
    "a method that needs each client's own update": lambda s: not s.traits.linear,
    "a method of which a part stays at each client": lambda s: s.traits.client_state,
    "a method that trains other tensors from round to round": lambda s: s.traits.varies,
    "a method some of whose numbers are never trained": lambda s: s.recipe.fixes,
    "a method that trains a share of the entries of full weights": (
        lambda s: s.recipe.fixes and not s.sent.adapters
    ),
    "a method whose clients send gradients first": lambda s: not s.recipe.steps,
    "factors that begin anew with each link": lambda s: s.traits.merges and _begins_anew(s.sent),
    "factors beside others that change with each link": (
        lambda s: s.traits.merges and next(iter(s.sent.adapters), "")
    ),
    "dora=true": lambda s: s.traits.rescales,
    "an allocation of ranks": lambda s: isinstance(s.run.method, Allocated | Pruned),
}
# These are looked at in each round, since what is sent may change.
IN_ROUNDS: dict[str, Feature] = {
    "other things to train at each client": lambda s: s.sent.apart,
    "clients that start from factors of their own": (
        lambda s: any(slot.per_client for slot in s.sent.uploaded().values())
    ),
    "a round without a mean gradient": lambda s: _no_mean_gradient(s.sent),
    "a method that asks other things of each client, or twice in a round": (
        lambda s: s.sent.apart or not s.recipe.steps
    ),
}
FEATURES = SETTINGS | METHODS | IN_ROUNDS
