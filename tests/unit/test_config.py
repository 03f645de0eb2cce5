"""From a plain dict to checked settings: what is refused, and in which words."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml

from fedraclora.binding import bind, build, section, without
from fedraclora.compose.choices import CONF, NODES, choice
from fedraclora.compose.values import is_whole
from fedraclora.config import run_config
from fedraclora.config.keys import choices_with
from fedraclora.config.run_config import (
    NOT_IN_DIGEST,
    RunConfig,
    TaskConfig,
    digested,
    from_plain,
    task_from_plain,
)
from fedraclora.config.settings import (
    ENGINES,
    Chunk,
    CompressionConfig,
    EvaluateConfig,
    OutputConfig,
    PretrainConfig,
    RayConfig,
)
from fedraclora.errors import ConfigError, MissingKeysError, UnreadKeysError, unknown
from fedraclora.limits import AddedKey, OneOf, later_keys
from fedraclora.protocol.method import Method
from fedraclora.protocol.quantized import ROUNDED
from fedraclora.schema import checked_values
from fedraclora.strategies.methods import METHODS
from fedraclora.training.extras.settings import LocalSettings

METHOD_TABLE: Mapping[str, type[Method]] = METHODS
GROUPS = (
    *("method", "data", "partition", "model", "local", "engine", "system", "pretrain", "output"),
    *("aggregator", "server_optimizer", "attack", "privacy", "secure", "allocation"),
)


def plain(**changes: Any) -> dict[str, Any]:
    """The keys of no group, and the groups that conf/config.yaml chooses, with dotted changes."""
    top: dict[str, Any] = copy.deepcopy(NODES["run"])
    chosen: dict[str, str] = {}
    for entry in yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]:
        if isinstance(entry, dict):
            chosen |= entry
    for group in GROUPS:
        top[group] = choice(group, chosen[group])
    for dotted, value in changes.items():
        place, keys = top, dotted.split("__")
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = copy.deepcopy(value)
    return top


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        from_plain(plain(**changes), METHOD_TABLE)
    return str(caught.value)


def test_what_was_checked_is_read_and_no_dict_beside_it() -> None:
    """The dict of a checked config is written again, and no key of it is read."""
    root = Path(__file__).resolve().parents[2]
    writers = {  # of config.yaml, of a model card, for another process; and whose code is trusted
        *("commands/app.py", "commands/check.py"),
        *("strategies/runner.py", "strategies/start.py", "strategies/trained.py"),
    }
    rooms = ("fedraclora", "strategies", "clients", "experiments")
    files = [file for room in rooms for file in (root / room).rglob("*.py")]
    readers = {file for file in files if re.search(r"\b(config|c)\.plain\b", file.read_text())}
    assert {"/".join(file.parts[-2:]) for file in readers} == writers
    raw = re.compile(r"section\((\w+\.)*(config|c)\.plain|\b(config|c)\.plain(\[|\.get)")
    assert [str(file) for file in readers if raw.search(file.read_text())] == []


# --- the whole -----------------------------------------------------------------------------------


def test_the_defaults_are_a_run() -> None:
    whole = plain()
    config = from_plain(whole, METHOD_TABLE)
    assert isinstance(config, RunConfig)
    assert type(config.method) is METHODS["fed_rac_lora"]
    assert config.local == LocalSettings(**without(whole["local"], "name"))  # type: ignore[arg-type]
    assert config.plain is whole
    assert config.clients == 200


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_of_the_table_is_read_from_its_yaml(name: str) -> None:
    group = choice("method", name)
    config = from_plain(plain() | {"method": group}, METHOD_TABLE)
    wanted = METHODS[name](**without(group, "name"))
    assert config.method == wanted


def test_what_decides_the_result_is_digested_and_no_more() -> None:
    config = from_plain(plain(), METHOD_TABLE)
    left_out = set(config.plain) - set(config.digested)
    assert left_out == {*NOT_IN_DIGEST, *later_keys(RunConfig)}
    there, here = config.plain["engine"], config.digested["engine"]
    assert isinstance(there, dict)
    assert here == {"chunk": there["chunk"], "threads": there["threads"]}


def test_where_clients_run_does_not_decide_the_result() -> None:
    groups = [choice("engine", name) for name in ("vectorized", "ray")]
    first, second = (from_plain(plain() | {"engine": g}, METHOD_TABLE) for g in groups)
    assert first.digested == second.digested
    assert isinstance(second.engine, RayConfig)


def test_what_clients_need_is_read_without_a_method() -> None:
    whole = {k: v for k, v in plain().items() if k not in {"method", "rounds", "output"}}
    task = task_from_plain(whole)
    run = from_plain(plain(), METHOD_TABLE)
    same = set(TaskConfig.__dataclass_fields__) - {"plain"}
    assert all(getattr(task, key) == getattr(run, key) for key in same)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"method__name": "fed_rac_lorra"},
            "unknown method 'fed_rac_lorra'; did you mean 'fed_rac",
        ),
        ({"method__rnak": 4}, "unknown key 'method.rnak'; did you mean 'method.rank'"),
        ({"method__rank": "four"}, "method.rank='four': expected a positive integer, a fraction"),
        ({"method__rank": 0}, "method.rank=0: expected a positive integer"),
        ({"method__rank": True}, "method.rank=True"),
        ({"method__rank": -3}, "method.rank=-3: expected a positive integer"),
        ({"method__rank": 1.5}, "without a dot"),
        ({"method__alpha": -1}, "method.alpha=-1"),
        ({"method__alpha": float("inf")}, "method.alpha=inf"),
        ({"local__lr": 0}, "local.lr=0: expected auto, or a number above 0"),
        ({"local__lr": float("inf")}, "local.lr=inf"),
        ({"local__lr": float("nan")}, "local.lr=nan"),
        ({"local__full_lr": 0}, "local.full_lr=0"),
        ({"local__optimizer": "sdg"}, "did you mean 'sgd'"),
        ({"local__schedule": "cosin"}, "did you mean 'cosine'"),
        ({"head": "adpt"}, "There are: frozen, full, lora"),
        ({"bias": "froze"}, "did you mean 'frozen'"),
        ({"aggregation_weights": "exmples"}, "did you mean 'samples'"),
        ({"clients_per_round": "all"}, "clients_per_round='all'"),
        ({"method__alpha": 0}, "method.alpha=0"),
        ({"method__alpha": float("nan")}, "method.alpha=nan"),
        ({"method__alpha": None}, "method.alpha=None"),
        ({"method__sketch": "gausian"}, "unknown method.sketch 'gausian'; did you mean 'gaussian'"),
        ({"method__train": "lefty"}, "unknown method.train 'lefty'"),
        ({"method__merge_every": 0}, "method.merge_every=0: expected 1 or more, or null"),
        ({"method__density": 0.0}, "method.density=0.0: expected a number in (0, 1]"),
        ({"method__blocks": "covers"}, "did you mean 'cover'"),
        ({"method__normalize": "row"}, "did you mean 'rows'"),
        ({"data__name": "mnist5k"}, "unknown data 'mnist5k'; did you mean 'mnist_5k'"),
        ({"model__name": "mpl"}, "unknown model 'mpl'; did you mean 'mlp'"),
        ({"local__lr": "fast"}, "local.lr='fast': expected auto, or a number above 0"),
        (
            {"compression": {"uplink": 8}},
            f"compression.uplink=8: expected one of float32, {', '.join(ROUNDED)}",
        ),
        (
            {"output__dir": 42},
            "or null: quote it, 'output.dir=\"42\"'",
        ),
        ({"head": None}, "head=None: expected one of lora, full, frozen, personal"),
        ({"local__schedule": 1}, "one of constant, cosine, linear, step"),
        ({"method__train": 1}, "method.train=1: expected one of B, A, auto"),
        (
            {"method__sketch": 1},
            "method.sketch=1: expected one of orthonormal, coordinate, srht, gau",
        ),
        ({"local__lr": -0.5}, "local.lr=-0.5"),
        ({"local__momentun": 0.5}, "unknown key 'local.momentun'; did you mean 'local.momentum'"),
        ({"local__epochs": 1.5}, "local.epochs=1.5: expected int"),
        ({"local__shuffle": "yes"}, "local.shuffle='yes': expected bool"),
        ({"local__shuffle": 1}, "local.shuffle=1: expected bool"),
        ({"local__clip": "none"}, "local.clip='none': expected float or null"),
        ({"engine__name": "vectorizd"}, "unknown engine 'vectorizd'; did you mean 'vectorized'"),
        ({"engine__chunk": 0}, "engine.chunk=0: expected auto, or a number of clients"),
        (
            {"engine__chunk": "automatic"},
            "engine.chunk='automatic': expected auto, or a number of clients",
        ),
        ({"engine__threads": 0}, "engine.threads=0"),
        ({"engine__name": "inline", "engine__chunk": 4}, "engine.chunk=4: expected 1, one client"),
        ({"engine__name": "ray", "engine__workers": 0}, "engine.workers=0"),
        ({"engine__name": "ray", "engine__gpus": -1}, "engine.gpus=-1"),
        ({"engine__name": "ray", "engine__retries": -1}, "engine.retries=-1"),
        ({"engine__name": "ray", "engine__timeout": 0}, "engine.timeout=0"),
        ({"engine__name": "flower"}, "'flower' is no more: use engine=ray"),
        ({"engine__workers": 2}, "unknown key 'engine.workers'"),
        ({"evaluate__every": 0}, "evaluate.every"),
        ({"evaluate__split": "tests"}, "unknown evaluate.split 'tests'; did you mean 'test'"),
        ({"output__checkpoint_every": 0}, "output.checkpoint_every=0: expected 1 or more"),
        ({"output__sync": None}, "output.sync=None: expected bool"),
        ({"rounds": -1}, "rounds=-1: expected 0 or more"),
        ({"rounds": 1.0}, "rounds=1.0: expected int"),
        ({"clients": 0}, "clients=0: expected 1 or more, or null"),
        ({"clients_per_round": 0}, "clients_per_round=0: expected a number of clients, or a share"),
        ({"clients_per_round": -3}, "clients_per_round=-3"),
        ({"clients_per_round": 1.5}, "clients_per_round=1.5"),
        ({"clients_per_round": float("nan")}, "clients_per_round=nan"),
        (
            {"clients_per_round": 201},
            "clients_per_round=201, but there are only 200 clients; lower clients_per_round or",
        ),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"precision": "bf16"}, "unknown precision 'bf16'; did you mean 'bf16-mixed'"),
        ({"aggregator__name": "means"}, "unknown aggregator 'means'; did you mean 'mean'"),
        ({"seed": "zero"}, "seed='zero': expected int"),
        ({"max_failures": None}, "max_failures=None: expected int"),
        ({"max_failures": -1}, "max_failures=-1: expected 0 or more"),
        ({"allocation__name": "hetrolora"}, "did you mean 'heterolora'"),
        ({"partition__name": "dirichlett"}, "did you mean 'dirichlet'"),
        ({"pretrain__epochs": -1}, "pretrain.epochs=-1"),
        ({"pretrain__lr": -0.1}, "pretrain.lr=-0.1"),
        ({"pretrain__batch_size": 0}, "pretrain.batch_size=0"),
        ({"pretrain__labels": ["five"]}, "pretrain.labels"),
        ({"local__schedule": "step", "local__step_every": 0}, "local.step_every=0"),
        ({"local__momentum": 1}, "local.momentum=1: expected a number in [0, 1)"),
        ({"local__prox": float("nan")}, "local.prox=nan"),
        ({"local__weight_decay": float("inf")}, "local.weight_decay=inf"),
        ({"local": choice("local", "adamw") | {"beta1": 2}}, "local.beta1=2"),
        ({"model__dropout": 1}, "model.dropout=1"),
        ({"data__test_fraction": 1}, "data.test_fraction=1"),
        ({"local": None}, "the config needs a section local, but has local=None"),
        ({"method": "fedavg"}, "a section method, but has method='fedavg': it has keys of its own"),
    ],
)
def test_what_cannot_run_is_refused_by_its_key(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(**changes)


def test_keys_that_are_missing_are_named_in_one_message() -> None:
    whole = plain(system__speed={"name": "lognormal", "median": 3.0})
    del whole["clients_per_round"], whole["rounds"]
    with pytest.raises(MissingKeysError) as caught:
        from_plain(whole, METHOD_TABLE)
    assert "no key clients_per_round, rounds" in str(caught.value)
    assert "system.speed.sigma is missing" in str(caught.value)
    assert set(caught.value.keys) == {"clients_per_round", "rounds", "system.speed.sigma"}


def test_all_that_a_row_lacks_is_named() -> None:
    def row(*, first: int, second: float, given: int) -> None:
        del first, second, given

    with pytest.raises(MissingKeysError) as caught:
        bind("thing", {"a": row}, {"name": "a"}, given=3)
    assert caught.value.keys == ("thing.first", "thing.second")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("lr", r"'local.lr' or 'pretrain.lr'?"),
        ("learning_rate", r"'local.lr' or 'pretrain.lr'?"),
        ("clints", "did you mean 'clients'?"),
        ("zzzzzz", "key 'zzzzzz'"),
    ],
)
def test_a_key_of_the_config_that_does_not_exist_is_refused(key: str, near: str) -> None:
    with pytest.raises(UnreadKeysError, match=re.escape(near)):
        from_plain({**plain(), key: 3}, METHOD_TABLE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__rot": "x"}, "unknown key 'data.rot'; did you mean 'data.root'"),
        ({"model__hiden": [3]}, "unknown key 'model.hiden'; did you mean 'model.hidden'"),
        ({"partition__alpa": 1.0}, "unknown key 'partition.alpa'; did you mean 'partition.alpha'"),
        ({"partition": {"name": "iid", "alpha": 1.0}}, "unknown key 'partition.alpha'"),
        ({"model": {"name": "hf"}}, "model.path is missing: expected str"),
    ],
)
def test_keys_of_data_model_and_partition_are_checked_with_the_others(
    changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(**changes)


STEPS = {"local__schedule": "step"}
FACTORS = {**choice("method", "fedavg_lora")}
DRAWN = {**choice("method", "subspace_rac_lora"), "fresh": 1.0}
BOOTSTRAP = {**choice("partition", "bootstrap"), "sizes": "constant"}
VIRTUAL = {"name": "virtual", "sizes": "constant"}
GIVEN: dict[str, Any] = {"partition": {"name": "given"}, "clients": None}
IDLE: list[tuple[str, object, dict[str, Any]]] = [  # key, value, and what it takes to read it
    ("local.damping", 0.1, {"method": FACTORS, "local__adjust": "riemannian"}),
    ("local.min_lr_ratio", 0.3, {"local__schedule": "cosine"}),
    ("local.step_factor", 0.1, STEPS),
    ("local.step_every", 7, STEPS),
    ("local.epochs", 3, {"local__steps": None}),
    ("local.full_lr", 0.3, {"bias": "full"}),
    ("local.optimizer_state_kept", 0.1, {"method": FACTORS | {"merge_every": 4}}),
    ("method.density", 0.3, {"method__sketch": "sparse_sign"}),
    ("method.kept_scale", 0.5, {"method": DRAWN | {"fresh": 0.5}}),
    ("method.pairs", True, {"method": DRAWN | {"fresh": 0.5}}),
    ("pretrain.lr", 0.1, {"pretrain__epochs": 2}),
    ("pretrain.batch_size", 7, {"pretrain__epochs": 2}),
    ("pretrain.labels", [1], {"pretrain__epochs": 2}),
    ("attack.share", 0.3, {"attack": {"name": "label_flip"}}),
    ("evaluate.sample", 7, {"head": "personal"}),
    ("stop.metric", "accuracy", {"stop__patience": 3}),
    ("partition.spread", 1.5, {"partition": BOOTSTRAP | {"sizes": "pareto"}}),
    ("data.spread", 1.5, {"data": VIRTUAL | {"sizes": "lognormal"}, **GIVEN}),
]
BESIDE: dict[str, Any] = {  # what puts all of these out of action
    "local__steps": 2,
    "bias": "frozen",
    "local__optimizer_state": "merge",
    "local__momentum": 0.5,
    "pretrain": {"name": "none"},
}


@pytest.mark.parametrize(("key", "value", "reader"), IDLE, ids=[key for key, *_ in IDLE])
def test_a_key_that_nothing_reads_is_refused_by_name(
    key: str, value: object, reader: dict[str, Any]
) -> None:
    dotted = key.replace(".", "__")
    needs: dict[str, dict[str, Any]] = {
        "local.optimizer_state_kept": {"method": FACTORS},
        "method.kept_scale": {"method": DRAWN},
        "method.pairs": {"method": DRAWN},
        "partition.spread": {"partition": BOOTSTRAP},
        "data.spread": {"data": VIRTUAL, **GIVEN},
    }
    idle = {**BESIDE, **needs.get(key, {})}
    with pytest.raises(UnreadKeysError, match=f"^{key}=.*has no effect here") as caught:
        from_plain(plain(**idle, **{dotted: value}), METHOD_TABLE)
    assert caught.value.keys == (key,)
    from_plain(plain(**{**BESIDE, **reader, dotted: value}), METHOD_TABLE)


def test_all_keys_that_nothing_reads_are_named_at_once() -> None:
    said = refusal(attack__share=0.3, local__min_lr_ratio=0.1, evaluate__sample=3)
    assert {line.split("=")[0].strip() for line in said.splitlines()} == {
        "local.min_lr_ratio",
        "attack.share",
        "evaluate.sample",
    }


def test_a_run_that_goes_on_keeps_what_an_earlier_version_passed_over() -> None:
    old = {**plain(attack__share=0.3, local__name="mine"), "lr": 0.1}
    assert from_plain(old, METHOD_TABLE, resuming=True).attack.share == 0.3


def test_a_metric_that_does_not_exist_stops_nothing() -> None:
    assert "unknown stop.metric 'acuracy'; did you mean 'accuracy'?" in refusal(
        stop__metric="acuracy"
    )


def test_choices_that_have_a_key() -> None:
    assert choices_with("attack.scale", METHOD_TABLE) == ["sign_flip", "scaled_noise"]
    assert choices_with("local.lr", METHOD_TABLE) == ["local"]
    assert "fedavg" not in choices_with("method.rank", METHOD_TABLE)
    assert choices_with("method.rnak", METHOD_TABLE) == choices_with("seed", METHOD_TABLE) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"clients_per_round": "100%"},
        {"clients_per_round": 1},
        {"clients_per_round": 200},
        {"rounds": 0},
    ],
)
def test_limits_are_part_of_what_is_allowed(changes: dict[str, Any]) -> None:
    from_plain(plain(**changes), METHOD_TABLE)


def test_the_data_may_bring_their_own_clients() -> None:
    assert from_plain(plain(clients=None, clients_per_round=50), METHOD_TABLE).clients is None


# --- settings ------------------------------------------------------------------------------------

OF_OWN_TRAINING = {"train", "parameters", "timeout"}  # keys of local=own alone


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (LocalSettings, "local/adamw"),
        *((kind, f"engine/{name}") for name, kind in ENGINES.items()),
        (OutputConfig, "output/run"),
        (OutputConfig, "output/study"),
        (PretrainConfig, "pretrain/none"),
        (PretrainConfig, "pretrain/digits_0_4"),
    ],
)
def test_a_group_sets_every_field_by_its_own_name(target: type[Any], path: str) -> None:
    group = choice(*path.split("/"))
    parameters = set(inspect.signature(target).parameters)
    apart = OF_OWN_TRAINING if target is LocalSettings else set()
    assert set(group) - ({"name"} - parameters) == parameters - apart


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_sgd_leaves_out_the_constants_of_adamw_and_nothing_else(name: str) -> None:
    keys = set(choice("local", name)) - {"name"}
    fields = set(inspect.signature(LocalSettings).parameters)
    assert fields - keys == {"beta1", "beta2", "eps"} | OF_OWN_TRAINING
    assert keys <= fields


@dataclass(frozen=True, kw_only=True)
class CompressionOfLater(CompressionConfig):
    pace: Annotated[Sequence[int], AddedKey()] = ()


@dataclass(frozen=True, kw_only=True)
class RunOfLater(RunConfig):
    """The config of a later release, with a key of its own and one in a section."""

    cosine: Annotated[bool, AddedKey()] = False
    wire: Annotated[CompressionOfLater, AddedKey()] = field(default_factory=CompressionOfLater)


@dataclass(frozen=True)
class MethodOfLater(METHODS["fed_rac_lora"]):  # type: ignore[misc]
    decay: Annotated[float, AddedKey()] = 0.5


def test_a_key_that_folders_of_before_lack_is_its_default_there_and_then_in_no_digest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    was = plain()
    before = from_plain(was, METHOD_TABLE).digested
    monkeypatch.setattr(run_config, "RunConfig", RunOfLater)
    monkeypatch.setitem(run_config.KINDS, "compression", CompressionOfLater)
    table = {**METHOD_TABLE, "fed_rac_lora": MethodOfLater}
    method, wire = {**was["method"], "decay": 0.5}, {**was["compression"], "pace": []}
    now = {**was, "cosine": False, "compression": wire, "method": method}
    short = without(was, *later_keys(RunConfig))
    for config in (was, now, short):
        found = from_plain(config, table, resuming=True)
        assert found.digested == before
        assert is_whole(config), "from Python it stands alone"
        assert (found.cosine, found.dora) == (False, False)  # type: ignore[attr-defined]
    for changed in ({"cosine": True}, {"method": {**method, "decay": 0.1}}):
        assert digested({**now, **changed}, table) != before
    half = {**was["compression"], "uplink": "int8"}
    assert digested({**now, "compression": half}, table) == digested(
        {**now, "compression": {**half, "pace": []}}, table
    )


def test_the_evaluation_is_set_in_the_run_itself() -> None:
    assert set(plain()["evaluate"]) == set(EvaluateConfig.__dataclass_fields__)


# --- signatures as the schema --------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """Something that is configured."""

    size: int
    share: float = 0.5
    label: str | None = None
    parts: list[int] | None = None
    widths: Sequence[int] = ()


def thing(*, size: int, seed: int = 0, extra: str = "") -> tuple[int, int, str]:
    return size, seed, extra


def test_a_group_is_called_with_its_keys() -> None:
    assert build("thing", Thing, {"size": 3, "share": 1}) == Thing(3, 1.0)
    assert isinstance(build("thing", Thing, {"size": 3, "share": 1}).share, float)


def test_a_row_of_a_table_is_bound_with_what_it_asks_for() -> None:
    call = bind("thing", {"a": thing}, {"name": "a", "size": 2}, seed=7, clients=5)
    assert call() == (2, 7, "")
    given = bind("thing", {"a": thing}, {"name": "a", "size": 2, "seed": 1}, seed=7)
    assert given() == (2, 1, ""), "what the group sets is not overridden"


def test_unknown_rows_and_keys_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown thing 'b'.*There are: a"):
        bind("thing", {"a": thing}, {"name": "b"})
    with pytest.raises(ConfigError, match="unknown thing 'None'"):
        bind("thing", {"a": thing}, {})
    with pytest.raises(ConfigError, match=r"unknown key 'thing\.sise'; .*'thing\.size'"):
        build("thing", Thing, {"sise": 1})
    for name, near in (("galor", "galore_average"), ("fed_rac", "fed_rac_lora"), ("lor", "lora")):
        with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
            bind("method", METHOD_TABLE, {"name": name})


def taken(value: object, hint: object) -> object:
    """Check a value of a key that has this type."""

    def row(*, key: Any) -> object:
        return key

    row.__annotations__["key"] = hint
    return checked_values("", row, {"key": value})["key"]


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (3, int | float, 3),
        (0.5, int | float, 0.5),
        (3, float | str, 3.0),
        ("auto", float | str, "auto"),
        (None, int | None, None),
        (True, bool, True),
        ([1, 2], list[int] | None, [1, 2]),
        ([1, 2], Sequence[int], [1, 2]),
        ({"a": 1}, object, {"a": 1}),
        (None, object, None),
    ],
)
def test_values_that_fit_pass(value: object, hint: object, wanted: object) -> None:
    found = taken(value, hint)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ("3", int, "='3': expected int"),
        (3.0, int, "=3.0: expected int"),
        (True, int, "=True: expected int"),
        (True, float, "=True: expected float"),
        (None, int, "=None: expected int"),
        (1, bool, "=1: expected bool"),
        (1, str | None, "str or null"),
        (1, Annotated[str, OneOf("ab")] | None, "a, b or null"),
        (1.5, Chunk, "int or str"),
        ("x", list[int], "key='x': expected a list of"),
        ([1], int | None, "int or null"),
    ],
)
def test_values_that_do_not_fit_name_key_value_and_type(
    value: object, hint: object, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        taken(value, hint)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("value", "hint"), [(["a"], list[int]), ([1, None], list[int] | None), ("ab", Sequence[int])]
)
def test_the_elements_of_a_list_are_checked(value: object, hint: object) -> None:
    with pytest.raises(ConfigError, match="key="):
        taken(value, hint)


def test_groups_are_copied_not_changed() -> None:
    whole = {"group": {"name": "a", "x": 1}}
    part = section(whole, "group")
    part["x"] = 2
    assert whole["group"]["x"] == 1
    assert without(whole["group"], "name", "absent") == {"x": 1}


def test_unknown_lists_every_name_sorted() -> None:
    assert str(unknown("fruit", "zzz", ["pear", "apple"])) == (
        "unknown fruit 'zzz'. There are: apple, pear"
    )
    assert "did you mean 'pear'" in str(unknown("fruit", "paer", ["pear", "apple"]))
