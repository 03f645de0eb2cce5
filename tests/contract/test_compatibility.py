"""What does not go together: who declares it, who is told, and that methods keep to it."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import fedraclora
from fedraclora.aggregation.robust import GeometricMedian, Krum
from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.allocation import HeteroLora
from fedraclora.compatibility import KNOWN, Feature, Features, declared_by
from fedraclora.compose.choices import groups
from fedraclora.compose.values import config_of
from fedraclora.config.run_config import RunConfig, from_plain
from fedraclora.devices.distributions import Constant
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError
from fedraclora.lowrank.dora import DORA
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.secagg import SecAgg
from fedraclora.protocol.method import (
    ASKS_TWICE,
    BEGINS_ANEW,
    BEYOND_WEIGHTS,
    DOES_MORE,
    Cohort,
    Draw,
    Method,
    RoundInstructions,
)
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.methods.fedavg_lora import FedAvgLora
from fedraclora.strategies.server.device_simulator import DeviceSimulator
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.server.round_step import RoundStep, RoundSteps, RunContext
from fedraclora.strategies.steps import round_steps
from fedraclora.training.extras.settings import LocalSettings
from tests.contract.worlds import every_variant, make_method, make_world

Variant = tuple[str, dict[str, Any]]
Promise = Callable[[Method, RoundInstructions], bool]
ROOT = Path(__file__).resolve().parents[2]
GROUPS = [*groups(), "compression", "evaluate", "stop"]
SGD = LocalSettings(lr=0.1, steps=2, batch_size=0)
WORDS = (
    "data=digits",
    "pretrain=none",
    "output.progress=false",
    "clients=4",
    "clients_per_round=3",
    "local.lr=0.5",
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


def takes_parts(method: Method) -> bool:
    return bool(Features([method]).has("a method that takes its first factors out of the weights"))


@DORA
class Lengths(RoundStep):
    """Has the feature of lengths of rows."""


@Feature("a test of links", avoids={"a method that merges after every round": "it is one"})
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
    "an allocation": Choice(
        lambda m, _: m.recurs or m.client_state or takes_parts(m),
        {"allocation": HeteroLora()},
    ),
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


def test_each_feature_excludes_or_reads_something_or_is_excluded() -> None:
    used = {name for feature in KNOWN.values() for name in [*feature.avoids, *feature.requires]}
    for name, feature in KNOWN.items():
        if not name.startswith("a test"):
            assert name in used or feature.avoids or feature.requires or feature.reads


@every_variant
def test_a_method_says_whether_it_takes_its_first_factors_out_of_the_weights(
    variant: Variant,
) -> None:
    world, method = make_world(), make_method(variant[0], **variant[1])
    state = method.initial_state(world.base, world.plan, Draw(1))
    moved = any(state.base[name] is not weight for name, weight in world.base.items())
    said = Features([method]).has("a method that takes its first factors out of the weights")
    sent = method.open_round(state, 1, Cohort(torch.arange(2), torch.ones(2)), Draw(1))
    assert moved <= bool(said) <= (moved or not sent.program.trains)


# A run that has the feature, of those that the config alone decides.
HAVING: dict[str, list[str]] = {
    "simulated devices": ["system.speed={name: constant, value: 1.0}"],
    "simulated devices with a speed or a network": ["system.speed={name: constant, value: 1.0}"],
    "simulated devices without a speed or a network": [],
    "system.availability=diurnal": ["system.availability={name: diurnal, share: 0.5}"],
    "system.buffer": ["system.buffer=2"],
    "system.deadline": ["system.deadline=3"],
    "system.over_select": ["system.over_select=1.5"],
    "system.rank_budget": ["system.rank_budget={name: constant, value: 0.5}"],
    "secure=secagg": ["secure=secagg", "secure.max_weight=9"],
    "privacy=client_level": ["privacy=client_level"],
    "privacy=client_level beside secure=secagg": [
        "privacy=client_level",
        "secure=secagg",
        "secure.max_weight=1",
    ],
    "privacy.quantile": ["privacy=client_level", "privacy.quantile=0.5"],
    "an aggregator other than mean": ["aggregator=median"],
    "a robust rule that needs each client's update": ["aggregator=median"],
    "a robust rule that returns one update for the round": ["aggregator=geometric_median"],
    "a robust rule that compares clients": ["aggregator=krum"],
    "an attack": ["attack=sign_flip"],
    "an attack whose clients collude": ["attack=a_little_is_enough"],
    "attack=label_flip": ["attack=label_flip"],
    "rank allocation": ["allocation=heterolora"],
    "allocation=heterolora": ["allocation=heterolora"],
    "allocation=adalora": ["allocation=adalora"],
    "engine=deploy": ["engine=deploy"],
    "max_failures": ["max_failures=1"],
    "head=personal": ["head=personal"],
    "head=personal that the server measures": ["head=personal"],
    "precision=float32": ["precision=float32"],
    "precision=bf16-mixed": ["precision=bf16-mixed"],
    "pretraining": ["pretrain.epochs=1"],
    "init_from": ["init_from=somewhere"],
    "data.validation": ["data.validation=0.1"],
    "data.labels": ["data.labels=[1,2]"],
    "data.objects=true": ["data=own", "data.objects=true", "data.samples=a:b"],
    "data=own": ["data=own"],
    "clients that bring their own samples": ["data=own"],
    "data without a division": ["data=digits"],
    "data without classes": ["data=least_squares"],
    "data of numbers": ["data=digits"],
    "data of texts": ["data=text", "data.file=f", "data.tokenizer=t", "local.lr=0.1"],
    "a partition that divides the rows of a table": ["partition=iid"],
    "a partition by class": ["partition=dirichlet"],
    "partition=given": ["partition=given"],
    "a model of numbers": ["model=mlp"],
    "a model of token ids": ["model=transformer"],
    "model.base below float32": ["model=causal_lm", "model.path=p", "model.base=int8"],
    "model.base=int8 or int4": ["model=causal_lm", "model.path=p", "model.base=int8"],
    "model.base=bfloat16": ["model=causal_lm", "model.path=p", "model.base=bfloat16"],
    "evaluate.generate": ["evaluate.generate=1"],
    "evaluate.choices": ["evaluate.choices=1"],
    "clients that measure": ["evaluate.clients=round"],
    "compression.uplink below float32": ["compression.uplink=int8"],
    "compression.downlink below float32": ["compression.downlink=int8"],
    "dora=true": ["dora=true"],
    "local=own": ["local=own", "local.train=a:b"],
    "local.dp": ["local=dp_sgd"],
    "local.momentum": ["local.momentum=0.5"],
    "local.optimizer_state=rows": ["local=adamw", "local.optimizer_state=rows"],
    "optimizer moments that are kept after a round": ["local.optimizer_state=run"],
    "optimizer moments that are kept after a merge": [
        "local.momentum=0.5",
        "local.optimizer_state=run",
    ],
    "an optimizer without moments": ["local.momentum=0"],
    "an optimizer without second moments": ["local.optimizer=sgd"],
    "a client program whose moments end with the round": ["local=lora_rite"],
    "a client program with a step of its own": ["local=lora_rite"],
    "an optimizer for pairs of factors": ["local.adjust=lora_pro"],
    "a second optimizer for pairs of factors": ["local.adjust=lora_pro", "local.precondition=true"],
    "server_optimizer.space=weights": ["server_optimizer=adam", "server_optimizer.space=weights"],
    "server_optimizer.space=factors": ["server_optimizer=adam", "server_optimizer.space=factors"],
    "a method that needs each client's update": ["method=flora_stacking"],
    "a method that keeps a part of the model at each client": ["method=fedsa_lora"],
    "a method that merges updates into the weights": ["method=fed_rac_lora"],
    "a method that merges after several rounds": ["method=fed_rac_lora", "method.merge_every=3"],
    "a method that trains different tensors in each round": ["method=rolora"],
    "a method whose frozen factors recur": ["method=pool_rac_lora"],
    "a method that starts from the factors of the last merge": ["method=rolora"],
    "a method that takes its first factors out of the weights": [
        "method=fedavg_lora",
        "method.init=pissa",
    ],
    "a method that restarts its components": ["method=fed_rac_lora"],
    "a method without rank budgets": ["method=fedavg"],
    "a method without one rank for all layers": ["method=fed_rac_lora", "method.rank=full"],
    "a method that moves all weights along shared random directions": ["method=fedkseed"],
    "a method that sends a scalar for each of method.steps": ["method=decomfl", "method.steps=4"],
    "method.blocks=cover": ["method=fed_rac_lora", "method.blocks=cover"],
    "method.init=gradient": ["method.init=gradient"],
    "two exchanges in a round": ["method.init=gradient"],
    "allocation.proxy=snip or synflow": ["allocation=heterolora", "allocation.proxy=snip"],
    "a factor that begins at zero": ["method=hetlora"],
    "output.checkpoint_every above 1": ["output.checkpoint_every=2"],
}
PAIRS = [
    (name, beside)
    for name, feature in KNOWN.items()
    for beside in feature.avoids
    if name in HAVING and beside in HAVING and not name.startswith("a test")
]


@pytest.mark.parametrize(("name", "beside"), PAIRS)
def test_a_declared_conflict_of_settings_is_raised(name: str, beside: str) -> None:
    # What is said last counts: the other order is looked at where the first has not both.
    assert {name, beside} in told_by(name, beside) or {name, beside} in told_by(beside, name)


def told_by(first: str, last: str) -> list[set[str]]:
    """List which of two features each line of their refusal names."""
    try:
        plain, _ = config_of((*WORDS, *HAVING[first], *HAVING[last]), {})
    except ConfigError:
        return []
    return [
        {name for name in (first, last) if name in line} for line in refusal_of(plain).split("\n")
    ]


def refusal_of(plain: dict[str, Any]) -> str:
    """Return the error of a config; empty: there is none."""
    try:
        from_plain(plain, METHODS)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("constant", [ASKS_TWICE, BEGINS_ANEW, BEYOND_WEIGHTS, DOES_MORE])
def test_a_feature_that_a_round_shows_is_raised_by_each_that_avoids_it(constant: Feature) -> None:
    """A method need not declare it, so each part that avoids it raises it while it computes."""
    avoiding = {name for name, feature in KNOWN.items() if constant.name in feature.avoids}
    raised = set[str]()
    for kind, beside in raised_in_code():
        if beside is constant:
            declared = (each.feature for each in declared_by(kind))
            raised |= {each.name for each in declared if constant.name in each.avoids}
    assert avoiding <= raised


# ---- No other code refuses a combination ----------------------------------------------------

RANGE = "two numbers of one part: no choice of another part is meant"
ONE = "two keys, of which one or both must be set"
LATER = "seen only when the data, the model or the cluster are there"
GUARD = "guards privacy where no config was checked"
ELSEWHERE = {
    ("fedraclora/allocation.py", "__post_init__"): RANGE,
    ("fedraclora/data/sources/shakespeare.py", "load_shakespeare"): RANGE,
    ("fedraclora/models/built.py", "require_heads"): RANGE,
    ("fedraclora/training/localconfig.py", "_check_warmup"): RANGE,
    ("strategies/wrappers/pruned.py", "initial_state"): RANGE,
    ("fedraclora/config/unread.py", "refuse_misfits"): ONE,
    ("fedraclora/data/encoders/conversations.py", "__post_init__"): ONE,
    ("fedraclora/data/locate.py", "load_tokenizer"): ONE,
    ("fedraclora/data/partitioners.py", "shards"): ONE,
    ("fedraclora/data/per_client.py", "whole"): ONE,
    ("fedraclora/data/sources/own.py", "own_samples"): ONE,
    ("fedraclora/data/sources/own.py", "_completed"): ONE,
    ("fedraclora/models/hf.py", "build_causal_lm"): ONE,
    ("fedraclora/privacy/client_level.py", "__post_init__"): ONE,
    ("fedraclora/config/pretraining.py", "pretrain_model"): LATER,
    ("fedraclora/data/encoders/labels.py", "found_classes"): LATER,
    ("fedraclora/data/encoders/table.py", "of_frames"): LATER,
    ("fedraclora/data/partition.py", "_dealt"): LATER,
    ("fedraclora/data/split.py", "hold_out"): LATER,
    ("fedraclora/engines/ray/cluster.py", "check_address"): LATER,
    ("fedraclora/engines/ray/cluster.py", "_count"): LATER,
    ("fedraclora/evaluation/generate.py", "__post_init__"): LATER,
    ("fedraclora/lowrank/layers.py", "find_targets"): LATER,
    ("fedraclora/models/pretrained.py", "_check_config"): LATER,
    ("fedraclora/protocol/plan.py", "make_plan"): LATER,
    ("fedraclora/training/precision.py", "check_precision"): LATER,
    ("strategies/builder.py", "watching"): LATER,
    ("strategies/builder.py", "plan"): LATER,
    ("fedraclora/privacy/client_level.py", "of"): GUARD,
    ("strategies/server/round_step.py", "steps_of"): "the objects of a call of Python",
}
CONFIG_KEY = re.compile(
    rf"\b(?:(?:{'|'.join(GROUPS)})\.[a-z_]+|(?:{'|'.join(inspect.signature(RunConfig).parameters)})=)"
)
ADVICE = re.compile(  # what an error tells to do names other keys
    r"(?:[.;:,(] ?|\b(?:and|or) )(?:set|use|leave|take|choose|lower|raise|name|write|give|add)\b",
    re.IGNORECASE,
)


@pytest.mark.slow
def test_no_other_code_refuses_a_combination_of_settings() -> None:
    """An error about two keys belongs to a declaration beside a part, but for those above."""
    found = {
        (path, function)
        for path, function, told in errors_in_code()
        if len({key.rstrip("=") for key in CONFIG_KEY.findall(ADVICE.split(told)[0])}) > 1
    }
    assert found - ELSEWHERE.keys() == set()
    assert ELSEWHERE.keys() - found == set(), "no such error is left: take its line away"


def errors_in_code() -> Iterator[tuple[str, str, str]]:
    """Yield file, function and text of each ConfigError that is raised."""
    for path, tree in trees():
        for function in ast.walk(tree):
            for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
                error = node.exc if isinstance(node, ast.Raise) else None
                if isinstance(error, ast.Call) and ast.unparse(error.func) == "ConfigError":
                    yield path, function.name, "".join(map(text_of, error.args))


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Yield each module of the packages, with its path."""
    for package in ("fedraclora", "strategies", "clients"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def text_of(node: ast.expr) -> str:
    """Return the text of a string as it is written, with X for what is put in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(text_of, parts))
        case ast.BinOp(left=left, right=right):
            return text_of(left) + text_of(right)
    return "X"


@cache
def raised_in_code() -> list[tuple[type, Feature]]:
    """List the class and the feature of each ``conflict(class, feature, ...)`` in the code."""
    found = []
    for path, tree in trees():
        name = path.removesuffix(".py").replace("/", ".").removeprefix("fedraclora.")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "conflict":
                module = vars(import_module(f"fedraclora.{name}"))
                kind, beside = (module[ast.unparse(each)] for each in node.args[:2])
                found.append((kind, beside))
    return found


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
    assert line.startswith(
        "secure=secagg does not go with a robust rule that needs each client's update"
    )
    assert "aggregator=krum" in line
    assert "aggregator=mean, or secure=none" in line


def test_what_clients_add_to_their_steps_is_looked_at() -> None:
    (line,) = told_of("local=dp_sgd", "evaluate.clients=round")
    assert line.startswith("clients that measure does not go with local.dp")


# ---- Parts of a user's own ------------------------------------------------------------------


@Feature("a test method", avoids={"compression.uplink below float32": "it reads the last bit"})
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
