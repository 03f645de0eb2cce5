"""What does not go together: one table, for the errors and for the page that prints it.

A feature is what a run may have that something else does not go with: a setting, a method, what is
sent. ``conflicts.yaml`` says of pairs of them why they do not go together, and of each what to take
in its place. A pair is looked at before the first round, and in each round where what is sent may
change; some are refused by the step that comes upon them when it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from typing_extensions import override

from fedraclora.aggregation.base import AggregationContext, Mean
from fedraclora.aggregation.server_optimisers import ServerOptimiser
from fedraclora.attacks import Attack
from fedraclora.errors import ConfigError, unknown
from fedraclora.lowrank.dora import magnitudes
from fedraclora.privacy.secagg import LEAST_CLIENTS
from fedraclora.protocol.change_of_basis import held_beside
from fedraclora.protocol.factor import Factor
from fedraclora.protocol.method import Cohort, Downlink, Method, State, Traits
from fedraclora.protocol.program import ClientProgram
from fedraclora.protocol.quantised import FULL
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.server.round_step import RoundStep, RunContext, step_name
from fedraclora.strategies.shared.initials import STARTS
from fedraclora.strategies.wrappers.allocated import Allocated
from fedraclora.strategies.wrappers.around import innermost
from fedraclora.strategies.wrappers.pruned import Pruned
from fedraclora.training.extras.prox import Prox
from fedraclora.training.extras.settings import SampleLevel
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.optimiser import row_slots

# What keys say that have chosen no step.
UNCHOSEN = {
    "aggregator": Mean(), "attack": Attack(), "control_variates": False, "privacy": None,
    "secure": None, "server_optimiser": ServerOptimiser(),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setup(RunContext):
    """A run, and what is asked in one of its rounds.

    Attributes:
        steps: What happens to a round besides.
        sent: What is asked.
    """

    steps: Sequence[RoundStep]
    sent: Downlink

    def __getitem__(self, key: str) -> Any:
        """Give what a key of the config says of its step."""
        return next((step.settings for step in self.steps if step.key == key), UNCHOSEN[key])

    @property
    def traits(self) -> Traits:
        """What the method promises."""
        return self.method.traits

    @property
    def inner(self) -> Method:
        """The method, without what is put around it."""
        return innermost(self.method)

    @property
    def program(self) -> ClientProgram:
        """What clients do with what is sent."""
        return self.sent.program

    @property
    def rule(self) -> str:
        """Name the aggregator in the place of the mean; empty: there is none."""
        rule = self["aggregator"]
        return "" if isinstance(rule, Mean) else f"aggregator={rule.name}"

    @property
    def server_space(self) -> str:
        """Where the server takes a step of its own; empty: it takes none."""
        rule = self["server_optimiser"]
        return "" if rule.name == "none" else str(rule.space)

    @property
    def max_weight(self) -> int:
        """The greatest weight of a client in a secure sum; 0: there is none."""
        return getattr(self["secure"], "max_weight", 0)

    def named(self, holds: Callable[[RoundStep], bool]) -> str:
        """Name a step of which something holds; empty: there is none."""
        return next(map(step_name, filter(holds, self.steps)), "")


def _moments(local: LocalConfig) -> str:
    """Name the setting that hands moments on."""
    if local.optimizer_state_kept:
        return f"local.optimizer_state_kept is {local.optimizer_state_kept}"
    return "local.optimizer_state is run" if local.optimizer_state == "run" else ""


def _beside_plain_sgd(local: LocalConfig) -> str:
    """Name a setting from whose steps the mean gradient cannot be told."""
    beside = {
        "optimiser": local.optimiser != "sgd",
        "momentum": local.momentum,
        "weight_decay": local.weight_decay,
        "clip": local.clip is not None,
    }
    found = [f"local.{n}={getattr(local, n)}" for n, used in beside.items() if used]
    return next(iter([*found, *(extra.setting for extra in local.added)]), "")


def _no_mean_gradient(sent: Downlink) -> str:
    """Name what keeps a round from having one mean gradient."""
    if sent.apart:
        return "other factors for each client"
    return "" if sent.program.plain else f"the client program {sent.program.name}"


def _part_of_weights(setup: Setup) -> str:
    """Name what is sent whole in each round and is a part of W, not of what was learnt; or empty.

    That is a product, or a tensor trained in full with a start of its own, which is not zero before
    anything was trained.
    """
    initial = getattr(setup.inner, "init", None)
    if initial in STARTS:  # of which one begins with a probe
        return f"method.init is {initial}"
    for name, adapter in setup.sent.adapters.items():
        factors = adapter.factors.values()
        if any(f.numbers is not None for f in factors) and all(map(_begun, factors)):
            return f"the factors of {name}"
    return next((name for name, slot in setup.sent.dense.items() if _begun(slot)), "")


def _begun(factor: Factor) -> bool:
    """Check whether a factor, as it is sent, is there and not zero."""
    return factor.sketch is not None if factor.numbers is None else bool(factor.numbers.any())


def _method(method: Method) -> str:
    """Name a method as a config does: ours that are not linear have the name of their module."""
    kind = type(method)
    package, _, module = kind.__module__.rpartition(".")
    ours = package == "fedraclora.strategies.methods"
    return f"method={module if ours else f'{kind.__module__}:{kind.__qualname__}'}"


# What a run may have, by name: whether it has it, or the value that it has; empty: it has not.
FEATURES: dict[str, Callable[[Setup], bool | str]] = {
    "engine=deploy": lambda s: s.loop.untrusted,
    "local=own": lambda s: s.local.is_own,
    "an attack": lambda s: s["attack"].share > 0 and f"attack={s['attack'].name}",
    "an attack whose clients collude": lambda s: (
        s["attack"].colludes and f"attack={s['attack'].name}"
    ),
    "attack=label_flip": lambda s: s["attack"].name == "label_flip",
    "another aggregator than mean": lambda s: s.rule,
    "a rule that looks at single updates": lambda s: s["aggregator"].individuals and s.rule,
    "a rule that makes one vector of a cohort": lambda s: s["aggregator"].estimates and s.rule,
    "a rule that compares clients": lambda s: s["aggregator"].compares and s.rule,
    # Steps whose keys stand in UNCHOSEN have rows of their own: rules, attacks, privacy.
    "another step that looks at single updates": lambda s: s.named(
        lambda step: step.individuals and step.key not in UNCHOSEN
    ),
    "a step of a program's own that stands before all others": lambda s: s.named(
        lambda step: step.own and step.first
    ),
    "privacy=client_level": lambda s: s["privacy"] is not None,
    "privacy.quantile": lambda s: getattr(s["privacy"], "quantile", None) is not None,
    "local.dp": lambda s: s.local.extra_of(SampleLevel) is not None,
    "secure=secagg": lambda s: s.max_weight > 0,
    "compression.uplink in fewer bits": lambda s: (
        s.loop.uplink != FULL and f"compression.uplink is {s.loop.uplink}"
    ),
    "compression.uplink=eden1": lambda s: s.loop.uplink == "eden1",
    "compression.feedback=true": lambda s: s.loop.feedback,
    "compression.downlink in fewer bits": lambda s: (
        s.loop.downlink != FULL and f"compression.downlink is {s.loop.downlink}"
    ),
    "local.optimizer_state=rows": lambda s: s.local.optimizer_state == "rows",
    "secure.max_weight=1": lambda s: s.max_weight == 1,
    "secure.max_weight above 1": lambda s: (
        s.max_weight > 1 and f"secure.max_weight is {s.max_weight}"
    ),
    "aggregation_weights=uniform": lambda s: s.loop.weights == "uniform",
    "aggregation_weights=samples": lambda s: s.loop.weights == "samples",
    "a cohort of two or less": lambda s: (
        s.loop.cohort < LEAST_CLIENTS and f"clients_per_round is {s.loop.cohort}"
    ),
    "too few clients that measure": lambda s: (
        s.measuring is not None
        and (count := s.measuring.count(s.loop)) < (least := s.measuring.asked.min_clients)
        and f"evaluate.clients asks {count}, evaluate.min_clients={least}"
    ),
    "control_variates=true": lambda s: s["control_variates"],
    "server_optimiser.space=weights": lambda s: s.server_space == "weights",
    "server_optimiser.space=factors": lambda s: s.server_space == "factors",
    "server_optimiser.space=weights beside links that end": lambda s: (
        s.server_space == "weights" and s.traits.merges and s.inner.link_rounds is not None
    ),
    "an adaptive server_optimiser with space=factors": lambda s: (
        s.server_space == "factors" and s["server_optimiser"].adapts
    ),
    "system": lambda s: s.devices.system.enabled,
    "devices that take time": lambda s: s.devices.system.timed,
    "system.buffer": lambda s: s.devices.system.buffer is not None,
    "local moments that live on": lambda s: _moments(s.local),
    "local.weight_decay": lambda s: (
        s.local.weight_decay > 0 and f"local.weight_decay is {s.local.weight_decay}"
    ),
    "local.prox": lambda s: (found := s.local.extra_of(Prox)) is not None and found.setting,
    "local epochs in the place of steps": lambda s: not s.local.steps,
    "local steps that are not plain SGD": lambda s: _beside_plain_sgd(s.local),
    "a method whose links last one round": lambda s: (
        not s.traits.pools and s.method.link_rounds == 1
    ),
    "a method whose links last several rounds": lambda s: (
        s.traits.merges and not s.traits.pools and (s.inner.link_rounds or 1) > 1
    ),
    "dora=true": lambda s: bool(magnitudes(s.sent.adapters, s.sent.dense)),
    "method.blocks=cover": lambda s: getattr(s.inner, "blocks", "") == "cover" and s.traits.merges,
    "factors or lengths that hold a part of the weights": _part_of_weights,
    "an allocation of ranks": lambda s: isinstance(s.method, Allocated | Pruned),
    "a method that needs each client's own update": lambda s: (
        not s.traits.linear and _method(s.inner)
    ),
    "a method of which a part stays at each client": lambda s: s.method.client_state,
    "a method that trains other tensors from round to round": lambda s: s.traits.varies,
    "a method some of whose numbers are never trained": lambda s: s.program.fixes,
    "a method that trains a share of the entries of full weights": lambda s: (
        s.program.fixes and not s.sent.adapters
    ),
    "a method whose clients send gradients first": lambda s: not s.program.trains,
    "a method that trains neither factor A nor B": lambda s: (
        s.program.trains and not row_slots(s.sent, {})
    ),
    "a method whose factors begin anew with each link": lambda s: (
        s.traits.merges
        and next((n for n, a in s.sent.adapters.items() if held_beside(a) is None), "")
    ),
    "a method whose factors stand beside others in each link": lambda s: (
        (s.traits.merges or s.traits.pools) and next(iter(s.sent.adapters), "")
    ),
    "a method whose clients send numbers along drawn directions": lambda s: (
        s.program.moves_weights and f"the client program {s.program.name}"
    ),
    "a method whose clients train by differences of losses": lambda s: s.program.forms_gradients,
    "momentum that is kept over rounds": lambda s: s.program.keeps_direction,
    "local.momentum": lambda s: s.local.momentum > 0,
    "a method with a pool of sketches": lambda s: s.traits.pools,
    "a method whose next link begins with what the last left": lambda s: s.inner.begins_with_last,
    # These three a step finds when it computes.
    "a method whose trained factors begin anew": lambda _: False,
    "a method whose frozen factors have changed": lambda _: False,
    "a method that asks twice in a round": lambda _: False,
}
# These are looked at in each round, since what is sent may change.
IN_ROUNDS: dict[str, Callable[[Setup], bool | str]] = {
    "other things to train at each client": lambda s: s.sent.apart,
    "other factors to start from at each client": lambda s: any(
        slot.per_client for slot in s.sent.uploaded().values()
    ),
    "a round without a mean gradient": lambda s: _no_mean_gradient(s.sent),
    "clients that send gradients": lambda s: not s.program.trains,
    "steps of the project's loop alone": lambda s: (
        not s.program.plain and f"the client program {s.program.name}"
    ),
}
FEATURES |= IN_ROUNDS


# Names that steps use which come upon one of them.
TWICE, ROW_MOMENTS = "a method that asks twice in a round", "local.optimizer_state=rows"
SECURE, PRIVATE, VARIATES = "secure=secagg", "privacy=client_level", "control_variates=true"
ADAPTIVE = "an adaptive server_optimiser with space=factors"

TABLE = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
WHY: dict[str, dict[str, str]] = yaml.safe_load(TABLE)
INSTEAD = WHY.pop("instead")
CONFLICTS = tuple((what, beside) for what, row in WHY.items() for beside in row)
IN_EACH_ROUND = tuple(pair for pair in CONFLICTS if {*pair} & IN_ROUNDS.keys())


def instead_of(name: str) -> str:
    """Say what to take in the place of a feature."""
    return INSTEAD.get(name, "another method")


def refused(what: str, beside: str, *found: bool | str) -> ConfigError:
    """Build the error of a pair; ``found`` are the values that were met, where there are several.

    It says why, and what to take: something else than the one, or than the other.
    """
    met = ", ".join(value for value in found if isinstance(value, str))
    return ConfigError(
        f"{what} does not go with {beside}{met and f' ({met})'}: {WHY[what][beside]}; "
        f"take {instead_of(beside)}, or {instead_of(what)}"
    )


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
        setup = self._check(CONFLICTS, sent)
        for step in self.steps:
            for beside, why in step.avoids.items():
                if beside not in FEATURES:
                    raise unknown(f"feature that {step_name(step)} avoids", beside, FEATURES)
                if FEATURES[beside](setup):
                    raise ConfigError(
                        f"the step {step_name(step)} does not go with {beside}: {why}; take "
                        f"{instead_of(beside)}, or leave the step out"
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

    def _check(self, pairs: Iterable[tuple[str, str]], sent: Downlink) -> Setup:
        setup = Setup(**vars(self.run), steps=self.steps, sent=sent)
        for what, beside in pairs:
            if (one := FEATURES[what](setup)) and (other := FEATURES[beside](setup)):
                raise refused(what, beside, one, other)
        return setup
