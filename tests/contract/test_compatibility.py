"""What does not go together: who declares it, who is told, and that methods keep to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fedraclora
from fedraclora.aggregation.robust import GeometricMedian, Krum
from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.allocation import HeteroLora
from fedraclora.compatibility import KNOWN, Feature
from fedraclora.devices.distributions import Constant
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError
from fedraclora.lowrank.dora import DORA
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.secagg import SecAgg
from fedraclora.protocol.method import Cohort, Draw, Method, RoundInstructions
from fedraclora.strategies.methods.fedavg_lora import FedAvgLora
from fedraclora.strategies.server.device_simulator import DeviceSimulator
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.server.round_step import RoundStep, RoundSteps, RunContext
from fedraclora.strategies.steps import round_steps
from fedraclora.training.extras.settings import LocalSettings
from tests.contract.worlds import every_variant, make_method, make_world

Variant = tuple[str, dict[str, Any]]
Promise = Callable[[Method, RoundInstructions], bool]
SGD = LocalSettings(lr=0.1, steps=2, batch_size=0)
WORDS = (
    "data=digits",
    "pretrain=none",
    "output.progress=false",
    "clients=4",
    "clients_per_round=3",
)


@dataclass(frozen=True)
class Choice:
    """Something that a run may have besides, and of which methods it is refused.

    Attributes:
        refused: Says so by what a method promises and sends.
        steps: What keys of the config say.
        local, system, loop: Other settings.
        own: Steps of a program's own.
    """

    refused: Promise
    steps: dict[str, Any] | None = None
    local: LocalSettings = SGD
    system: SystemConfig = SystemConfig()  # noqa: RUF009  frozen
    loop: dict[str, Any] | None = None
    own: tuple[RoundStep, ...] = ()


def starts_apart(sent: RoundInstructions) -> bool:
    return any(slot.per_client for slot in sent.uploaded().values())


@DORA
class Lengths(RoundStep):
    """Has the feature of lengths of rows."""


@Feature("a test of links", avoids={"a method whose links last one round": "it is one"})
class Links(RoundStep):
    """Does not go with links of one round."""


CHOICES = {
    "secure sums": Choice(
        lambda m, sent: not m.traits.linear or sent.apart, {"secure": SecAgg(max_weight=9)}
    ),
    "a rule of one vector": Choice(
        lambda m, sent: not m.traits.linear or sent.apart, {"aggregator": GeometricMedian()}
    ),
    "privacy": Choice(
        lambda m, sent: not m.traits.linear or sent.program.fixes or starts_apart(sent),
        {"privacy": ClientLevel(delta=1e-3)},
        loop={"weights": "uniform"},
    ),
    "a server optimizer of weights": Choice(
        lambda m, sent: sent.program.moves_weights or m.client_state,
        {"server_optimizer": Momentum(space="weights")},
    ),
    "moments of the run": Choice(
        lambda m, _: m.traits.varies,
        local=LocalSettings(lr=0.5, optimizer="adamw", optimizer_state="run"),
    ),
    "weight decay": Choice(
        lambda _, sent: sent.program.forms_gradients or (sent.program.fixes and not sent.adapters),
        local=LocalSettings(lr=0.5, weight_decay=0.1),
    ),
    "a pull to the start": Choice(
        lambda _, sent: sent.program.forms_gradients, local=LocalSettings(lr=0.5, prox=0.1)
    ),
    "an own training": Choice(
        lambda _, sent: not sent.program.plain,
        local=LocalSettings(lr=0.5, train="a.module:function"),
    ),
    "rank budgets": Choice(
        lambda m, _: not (m.traits.ranks and isinstance(getattr(m, "rank", None), int)),
        system=SystemConfig(rank_budget=Constant(0.5)),
    ),
    "lengths of rows": Choice(
        lambda m, sent: m.traits.merges or not sent.program.trains or moves(sent),
        own=(Lengths(),),
    ),
    "an allocation": Choice(lambda m, _: m.recurs or m.client_state, {"allocation": HeteroLora()}),
    "links": Choice(lambda m, _: m.link_rounds == 1 and not m.recurs, own=(Links(),)),
}


def moves(sent: RoundInstructions) -> bool:
    return bool(sent.program.moves_weights)


@every_variant
def test_a_method_is_refused_where_its_promises_say_so(variant: Variant) -> None:
    """A method of your own, too: what it promises is all that is looked at."""
    world, method = make_world(), make_method(variant[0], **variant[1])
    state = method.initial_state(world.base, world.plan, Draw(1))
    wrong = []
    for name, choice in CHOICES.items():
        budgets = torch.ones(2, dtype=torch.int64) if choice.system.rank_budget else None
        cohort = Cohort(torch.arange(2), torch.ones(2), budgets)
        sent = method.open_round(state, 1, cohort, Draw(1))
        loop = LoopConfig(rounds=2, clients=4, cohort=3, chunk=2, seed=1, **(choice.loop or {}))
        devices = DeviceSimulator(choice.system, 1, choice.local)
        steps = round_steps({"local": choice.local, **(choice.steps or {})}, own_of(choice))
        told = ""
        try:
            RoundSteps(steps, RunContext(method, choice.local, loop, devices), state)
        except ConfigError as error:
            told = str(error)
        if ("does not go with" in told) != choice.refused(method, sent):
            wrong.append((name, told))
    assert wrong == []


def own_of(choice: Choice) -> list[RoundStep]:
    """The steps of a choice: settings that no step is made of are those of a step that is there."""
    rule, given = (choice.steps or {}).get("allocation"), [*choice.own]
    if rule is not None:
        given.append(RoundStep())
        given[-1].settings = rule
    return given


# ---- Declarations ---------------------------------------------------------------------------


def test_each_declared_pair_is_of_features_that_exist_and_stands_once() -> None:
    named = [
        frozenset({name, other})
        for name, feature in KNOWN.items()
        for other in [*feature.avoids, *feature.requires]
    ]
    assert {name for pair in named for name in pair} <= {*KNOWN}
    assert [pair for pair, count in Counter(named).items() if count > 1] == []


def test_each_feature_avoids_something_or_is_avoided() -> None:
    used = {name for feature in KNOWN.values() for name in [*feature.avoids, *feature.requires]}
    idle = [n for n, f in KNOWN.items() if n not in used and not f.avoids and not f.requires]
    assert [name for name in idle if not name.startswith("a test")] == []


# ---- What a run is told ---------------------------------------------------------------------


def told_of(*words: str, **keys: Any) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        fedraclora.simulate(*WORDS, *words, **{"rounds": 1} | keys)
    return str(refused.value).split("\n  ")


def test_all_pairs_of_a_run_are_told_at_once() -> None:
    secure = ["secure=secagg", "secure.max_weight=2000"]
    local = ["local=adamw", "local.optimizer_state=rows"]
    words = [*secure, *local, "aggregator=krum", "compression.uplink=int8", "system=buffered"]
    found = told_of(*words)
    assert len(found) == len({*found}) >= 4
    assert sum("secure=secagg" in line for line in found) >= 3


def test_a_pair_of_settings_is_refused_before_data_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("data are read")

    monkeypatch.setattr("fedraclora.strategies.builder.build_task", read)
    (line,) = told_of("secure=secagg", "secure.max_weight=2000", "aggregator=krum")
    assert line.startswith("secure=secagg does not go with a rule that looks at single updates")
    assert "aggregator=krum" in line
    assert "aggregator=mean, or secure=none" in line


def test_what_clients_add_to_their_steps_is_looked_at() -> None:
    (line,) = told_of("local=dp_sgd", "evaluate.clients=round")
    assert line.startswith("clients that measure does not go with local.dp")


# ---- Parts of a user's own ------------------------------------------------------------------


@Feature("a test method", avoids={"compression.uplink in fewer bits": "it reads the last bit"})
@dataclass(frozen=True)
class Exacting(FedAvgLora):
    """FedAvg-LoRA that declares something."""


@dataclass(frozen=True)
class Choosy(Krum):
    """Krum that declares something where it is strict.

    Attributes:
        strict: Whether it does.
    """

    strict: bool = True

    @Feature("a test rule", instead="strict=false", avoids={"local.weight_decay": "it counts it"})
    def _refuses_decay(self) -> str:
        return "strict is true" if self.strict else ""


@Feature("a test program", requires={"local.steps": "it plans them"})
class Planned(fedraclora.ClientProgram):
    """A program that wants a number of steps."""


class Changing(RoundStep):
    """Has a feature in one round alone, which another step avoids."""

    at = 0

    @Feature("a test of rounds", each_round=True)
    def _is_second(self) -> bool:
        return self.at == 2

    def cohort(self, round_: int) -> None:
        self.at = round_


@Feature("a test of all rounds", avoids={"a test of rounds": "it is the second"})
class Steady(RoundStep):
    """Avoids what the other has."""


HERE = "tests.contract.test_compatibility"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([f"method={HERE}:Exacting", "compression.uplink=int8"], "compression.uplink=int8"),
        ([f"aggregator={HERE}:Choosy", "local.weight_decay=0.1"], "strict is true"),
        ([f"local.extras=[{HERE}:Planned]"], "a test program needs local.steps"),
    ],
)
def test_a_part_of_ones_own_declares_what_it_does_not_go_with(words: list[str], said: str) -> None:
    lines = told_of(*words, "aggregator.attackers=0" if "aggregator" in words[0] else "seed=1")
    assert len(lines) == 1
    assert lines[0].startswith("a test")
    assert said in lines[0]


def test_what_a_round_alone_has_is_refused_in_that_round() -> None:
    rows: list[Any] = []
    steps = [Changing(), Steady()]
    with pytest.raises(ConfigError, match="a test of all rounds does not go with a test of rounds"):
        fedraclora.simulate(*WORDS, "local.lr=0.5", rounds=3, steps=steps, callbacks=[rows.append])
    assert [row["round"] for row in rows] == [0, 1]
