"""Parts that a user brings: as an object and as ``module:name`` they give the same bits."""

from __future__ import annotations

import sys
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from flwr_datasets.partitioner import IidPartitioner
from torch import nn

import fedraclora
from fedraclora.attacks import Attack
from fedraclora.binding import OWN_GROUPS
from fedraclora.compose.choices import keys_of
from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.errors import CheckpointError, ConfigError, FedRacLoraError
from fedraclora.models.built import seeded
from fedraclora.protocol.program import ClientProgram
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.training.extras.settings import LocalSettings
from tests.common import FIXED

MODULE = """
from dataclasses import dataclass

import torch
from torch import nn

import fedraclora
from fedraclora.aggregation.robust import Median
from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.attacks import Attack
from fedraclora.limits import NotNegative
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.shared.layerwise import LayerUpdate
from fedraclora.protocol.program import ClientProgram, GradientStage
from fedraclora.training.extras.settings import LocalSettings

FACTOR = 3.0

@dataclass(frozen=True)
class Method(FedRacLora):
    \"\"\"A method of somebody's.

    Attributes:
        boost: Nothing.
    \"\"\"

    boost: float = 1.0

class Careless(FedRacLora):
    def update(self, layer, replies):
        return {"carried": {}}

class Turned(FedRacLora):
    def update(self, layer, replies):
        return LayerUpdate(merged=(torch.ones(layer.n, 2), torch.ones(2, layer.m)))

@dataclass(frozen=True)
class Louder(Attack):
    times: float = 2.0
    of: "Elsewhere | None" = None  # as if imported for a type checker alone

    def sent(self, updates, clients, key):
        return self.times * FACTOR * updates

@dataclass(frozen=True)
class Middle(Median):
    share: float = 0.5

    def estimate(self, rows):
        return self.share * super().estimate(rows)

@dataclass(frozen=True)
class Heavy(Momentum):
    beta: float = 0.5

@dataclass(frozen=True)
class Poison(Attack):
    def poisoned(self, data, classes, seed):
        raise fedraclora.errors.DataError(f"poison of {classes} classes")

@dataclass(frozen=True)
class Decay(ClientProgram):
    rate: NotNegative = 0.1
    form = "decay={rate}"

    def hooks(self, chunk):
        return {GradientStage.LOSS: lambda g, v: {n: g[n] + self.rate * v[n] for n in g}}

@dataclass(frozen=True)
class Local(LocalSettings):
    pull: float = 0.1

    @property
    def added(self):
        return (*super().added, Decay(self.pull))

class Halved(fedraclora.RoundStep):
    def __init__(self, by: float = 2.0):
        self.by = by

    def columns(self, exchange, got):
        return {"halved": 1.0 / self.by}

class Watch(fedraclora.Callback):
    def measure(self, weights, round_):
        return {"watched": round_}

def split(data, *, clients, seed, shift: int = 0):
    rows = range(len(data.train))
    return [[r for r in rows if (r + shift) % 4 == k] for k in range(4)]

def net(shape, classes, *, width: int = 5):
    return nn.Sequential(nn.Linear(*shape, width), nn.ReLU(), nn.Linear(width, classes))

def table(*, tilt: float = 0.0):
    x = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] + tilt * x[:, 1] > 0).long()

def steep(output, target, *, by: float = 1.0):
    return by * nn.functional.cross_entropy(output, target, reduction="none")

class Stretched(ClientProgram):
    form = "stretched"

    def hooks(self, chunk):
        return {GradientStage.LOSS: lambda g, v: {n: t[0] for n, t in g.items()}}

class Lost(ClientProgram):
    def hooks(self, chunk):
        return {GradientStage.LOSS: lambda g, v: {}}

def clients(*, tilt: float = 0.0):
    x, y = table(tilt=tilt)
    return list(zip(x.split(20), y.split(20)))

def part(client):
    return clients()[client]

def held():
    x, y = table(tilt=1.0)
    return x + 0.5, y

def wrong(output, target):
    return float((output.argmax(dim=1) != target).float().mean())

wrong.higher_is_better = False

def train(round):
    model = round.install(net((3,), 2))
    x, y = round.data
    nn.functional.cross_entropy(model(x), y).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.5).step()
    return round.read(model, samples=len(y), steps=1)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "brought_parts.py").write_text(MODULE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of what changes within a second
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "brought_parts", raising=False)
    import brought_parts  # type: ignore[import-not-found]

    return brought_parts


def digest(run: fedraclora.RunResult) -> object:
    return run.summary["weights_digest"]


def run(*words: Any, **keys: Any) -> fedraclora.RunResult:
    given = {"model": "brought_parts:net", "data": "brought_parts:clients", "rounds": 2}
    given = {k: v for k, v in given.items() if f"{k}=own" not in words}
    return fedraclora.simulate(*FIXED, "output.progress=false", *words, **{**given, **keys})


def network(mine: Any) -> Any:
    with seeded(0, "model"):
        return mine.net((3,), 2)


# A kind of part: how it is said as an object, and as words. Other keys come first in their names.
KINDS: dict[str, tuple[Any, list[Any]]] = {
    "model": (lambda m: {"model": network(m)}, ["model=brought_parts:net"]),
    "data": (lambda m: {"data": m.clients()}, ["data=brought_parts:clients"]),
    "loss": (
        lambda m: {"loss": partial(m.steep, by=2.0)},
        ["data.loss={name:brought_parts:steep,by:2.0}"],
    ),
    "test": (
        lambda m: {"data": m.clients(), "test": m.held()},
        [
            "data=own",
            "data.samples=brought_parts:part",
            "data.test_function=brought_parts:held",
            "clients=4",
        ],
    ),
    "metrics": (lambda m: {"metrics": [m.wrong]}, ["data.metrics=[brought_parts:wrong]"]),
    "train": (lambda m: {"train": m.train}, ["local=own", "local.train=brought_parts:train"]),
    "aggregator": (
        lambda m: {"aggregator": m.Middle(share=0.7)},
        ["aggregator=brought_parts:Middle", "aggregator.share=0.7"],
    ),
    "server_optimizer": (
        lambda m: {"server_optimizer": m.Heavy(lr=0.5)},
        ["server_optimizer=brought_parts:Heavy", "server_optimizer.lr=0.5"],
    ),
    "method": (
        lambda m: {"method": m.Method(rank=2, boost=2.0)},
        ["method=brought_parts:Method", "method.rank=2", "method.boost=2"],
    ),
    "attack": (
        lambda m: {"attack": m.Louder(share=0.5, times=4.0)},
        ["attack=brought_parts:Louder", "attack.share=0.5", "attack.times=4"],
    ),
    "local": (
        lambda m: {"local": m.Local(pull=0.3, lr=0.2)},
        ["local=brought_parts:Local", "local.pull=0.3", "local.lr=0.2"],
    ),
    "local.extras": (
        lambda m: {"local": {"extras": [m.Decay(0.3)]}},
        ["local.extras=[{name:brought_parts:Decay,rate:0.3}]"],
    ),
    "local.settings": (
        lambda m: {"local": m.LocalSettings(extras=[m.Decay(0.3)], lr=0.5)},
        ["local.extras=[{name:brought_parts:Decay,rate:0.3}]", "local.lr=0.5"],
    ),
    "steps": (
        lambda m: {"steps": [m.Halved(4.0)]},
        ["steps=[{name:brought_parts:Halved,by:4}]"],
    ),
    "callbacks": (lambda m: {"callbacks": [m.Watch()]}, ["callbacks=[brought_parts:Watch]"]),
    "partition": (
        lambda m: {"partition": m.split},
        ["partition=brought_parts:split"],
    ),
    "partition.er": (
        lambda _: {"partition": IidPartitioner(4)},
        ["partition=flwr_datasets.partitioner:IidPartitioner", "partition.num_partitions=4"],
    ),
}
SAME = {"model", "data", "metrics", "test", "partition.er"}  # as what runs without (iid)


@pytest.mark.short(when=lambda kind: kind == "extras")
@pytest.mark.parametrize("kind", KINDS)
def test_an_object_gives_the_bits_of_its_name(mine: Any, kind: str) -> None:
    make, words = KINDS[kind]
    divided = {"data": "brought_parts:table", "clients": 4} if "partition" in kind else {}
    by_object, by_name = run(**make(mine), **divided), run(*words, **divided)
    assert digest(by_object) == digest(by_name)
    columns = {*by_object.history.columns}
    assert columns == {*by_name.history.columns}
    if kind in {"steps", "callbacks"}:
        assert {"halved", "watched"} & columns
    elif kind not in SAME:
        assert digest(by_name) != digest(run(**({"partition": "iid"} | divided if divided else {})))
    # What a run says of itself is a whole config, which gives the same.
    assert digest(run_again(by_name, {})) == digest(by_name)
    if kind not in {"steps", "callbacks", "model", "data", "test"}:  # these are given anew
        assert digest(run_again(by_object, {})) == digest(by_object)


# What may be said beside a part, and must mean the same for an object and for its name.
BESIDE = [
    "head=full", "head=frozen", "head=personal", "bias=frozen", "target_modules=all",
    "target_modules=['0']", "modules_to_save=['0']", "model.head=['0']", "model.head=[]",
    "model.target_modules=['0']", "aggregation_weights=uniform", "compression.uplink=int8",
]  # fmt: skip


@pytest.mark.short(when=lambda kind, beside: kind == "model")
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_beside_a_part_holds_for_an_object_and_its_name(
    mine: Any, kind: str, beside: str
) -> None:
    """``head=full`` and ``head=frozen`` did nothing for a model by its name."""
    make, words = KINDS[kind]
    divided = {"data": "brought_parts:table", "clients": 4} if "partition" in kind else {}
    others = [word for word in words if word.partition("=")[0] != beside.partition("=")[0]]
    by_object = ended(beside, **make(mine), **divided)
    by_name = ended(beside, *others, **divided)
    assert by_object == by_name
    assert by_name[0] != "ConfigError" or kind != "model"


def test_a_head_that_a_model_does_not_have_is_not_trained_in_silence(mine: Any) -> None:
    del mine
    with pytest.raises(ConfigError, match=r"head=full.*head=lora"):
        run(model=nn.Linear(3, 3), head="full")


def ended(*words: str, **keys: Any) -> tuple[object, object]:
    """Give digest and uplink of a run; what it is refused by, and its key."""
    try:
        found = run(*words, **keys)
    except ConfigError as error:
        return "ConfigError", str(error).split(" ")[0]
    return digest(found), found.rows[-1]["uplink_bytes"]


def test_each_key_that_takes_an_object_is_among_these() -> None:
    said = {"choices", "client", "target", "folder", "resume", "keys", "on_round", "trust"}
    wanted = {*signature(fedraclora.simulate).parameters} - said | {*OWN_GROUPS}
    assert wanted == {kind.partition(".")[0] for kind in KINDS}


def run_again(before: fedraclora.RunResult, keys: dict[str, Any]) -> fedraclora.RunResult:
    return fedraclora.simulate({**before.config, "resume": None}, **keys)


def test_models_and_data_are_functions_with_parameters(mine: Any) -> None:
    with seeded(0, "model"):
        model = mine.net((3,), 2, width=7)
    wanted = run(model=model, data=mine.clients(tilt=3.0))
    found = run(
        model={"name": "brought_parts:net", "parameters": {"width": 7}},
        data={"name": "brought_parts:clients", "parameters": {"tilt": 3}},
    )
    assert digest(found) == digest(wanted)
    assert found.summary["clients"] == 4
    steep = {"name": "brought_parts:steep", "by": 2.0}
    data = {"name": "brought_parts:clients", "loss": steep}
    found = run("data.classes=2", data=data, rounds=1)
    assert found.config["data"]["loss"] == steep
    long = composed(["model=function", "model.function=brought_parts:net", "data=own"])
    short = composed(["model=brought_parts:net", "data=own"])
    assert short["model"] == long["model"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("method=brought_parts:Louder", "class Louder.* derived from .*Method"),
        ("attack=brought_parts:net", "a function.* derived from .*Attack"),
        ("attack=brought_parts:Nothing", "has no Nothing"),
        ("engine=brought_parts:Louder", "unknown engine .*There are"),
        ("method=brought_parts:Method method.boots=2", "has no key|boots"),
        ("attack=brought_parts:Louder attack.times=often", "attack.times='often': expected float"),
        ("attack=brought_parts:Louder attack.share=2", "attack.share=2"),
        ("local.extras=[{name:brought_parts:Decay,rat:2}]", r"extras\[0\]\.rat.*did you mean"),
        ("local.extras=[brought_parts:Halved]", "class Halved.*ClientProgram"),
        ("local.extras=[{name:brought_parts:Decay,rate:-2}]", r"local\.extras.*rate=-2.*from 0"),
        ("steps=[brought_parts:Decay]", r"steps\[0\].*class Decay.*RoundStep"),
        ("steps=[{name:brought_parts:Halved,by:much}]", r"steps\[0\].by='much': expected float"),
        ("callbacks=[brought_parts:FACTOR]", r"callbacks\[0\].*of type float"),
        ("model.parameters={width:wide}", "model.parameters.width='wide': expected int"),
        ("data.parameters={tild:3}", "data.parameters.tild.*did you mean"),
        ("attack=brought_parts:Poison attack.share=0.5", "poison of 2 classes"),
    ],
)
def test_what_is_wrong_with_a_part_is_said_by_its_key(mine: Any, words: str, said: str) -> None:
    with pytest.raises(FedRacLoraError, match=said):
        run(*words.split())


@pytest.mark.parametrize(
    ("name", "said"),
    [("Careless", "a dict.*LayerUpdate"), ("Turned", r"factors .*\(3, 2\).*\(B, A")],
)
def test_what_a_method_cannot_make_of_a_layer_is_refused(mine: Any, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} returns for \w+\.weight .*{said}"):
        run(method=f"brought_parts:{name}")


@pytest.mark.parametrize("name", ["Stretched", "Lost"])
def test_gradients_of_other_shapes_or_names_are_refused(mine: Any, name: str) -> None:
    with pytest.raises(FedRacLoraError, match=r"local\.extras.* gives .*expected"):
        run(local={"extras": [getattr(mine, name)()]})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"attack": 3.0}, "attack=3.0: give the name"),
        ({"local": "settings"}, "unknown local"),
        ({"local": {"lr": len}}, "local.lr .* type builtin"),
        ({"seed": len}, "seed is of type"),
        ({"local": {"extras": [3]}}, r"local.extras\[0\]|extras="),
        ({"local": {"extras": [object()]}}, r"extras\[0\].* type object.*ClientProgram"),
    ],
)
def test_objects_that_are_no_such_part_are_refused(mine: Any, keys: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(**keys)
    with pytest.raises(ConfigError, match=r"class Louder: give an instance"):
        run(attack=mine.Louder)
    with pytest.raises(ConfigError, match=r"local\.lr .*beside local"):
        run("local.lr=0.1", local=mine.LocalSettings(lr=0.5))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (lambda n: [range(n), [3]], "row 3 twice"),
        (lambda n: [[0, n]], "rows 0 to 64; .*0 to 63"),
        (lambda _: [[0.5, 1]], "client 0; .*row numbers"),
        (lambda _: [[[0], [1, 2]]], "client 0; .*row numbers"),
        (lambda _: 3, "gives 3 for client 0"),
        (lambda _: [[0], []], "1 of 2 clients without"),
        (lambda _: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_division_that_is_none_is_refused(mine: Any, rows: Any, said: str) -> None:
    def divide(data: Any, *, clients: int | None, seed: int) -> Any:
        return rows(len(data.train))

    with pytest.raises(FedRacLoraError, match=said):
        run(data="brought_parts:table", clients=2, partition=divide)


def test_a_partitioner_sees_the_columns_of_any_data(mine: Any) -> None:
    from flwr_datasets.partitioner import DirichletPartitioner

    skewed = DirichletPartitioner(3, "label", alpha=0.2, min_partition_size=1)
    found = run(data=(mine.table()), partition=skewed)
    assert found.summary["clients"] == 3
    with pytest.raises(ConfigError, match=r"DirichletPartitioner.*columns of .*label"):
        run(data=mine.table(), partition=DirichletPartitioner(3, "hospital", alpha=0.2))
    with pytest.raises(ConfigError, match=r"called with data, .*takes"):
        run(data="brought_parts:table", clients=2, partition="brought_parts:clients")
    with pytest.raises(ConfigError, match=r"clients=5.* 3"):
        run(data=mine.table(), clients=5, partition=IidPartitioner(3))


@pytest.mark.slow
@pytest.mark.short(when=lambda words, old, new: "attack" in words[0])
@pytest.mark.parametrize(
    ("words", "old", "new"),
    [
        (["attack=brought_parts:Louder", "attack.share=0.5"], "FACTOR = 3.0", "FACTOR = 4.0"),
        (["local.extras=[brought_parts:Decay]"], "g[n] + self", "g[n] - self"),
        (["steps=[brought_parts:Halved]"], "1.0 / self.by", "1.5 / self.by"),
    ],
)
def test_a_run_does_not_go_on_with_a_part_that_has_changed(
    mine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, old: str, new: str
) -> None:
    folder = tmp_path / "run"
    run(*words, folder=folder)
    longer: dict[str, Any] = {"folder": folder, "resume": True, "rounds": 3}
    text = MODULE.replace(old, new)
    assert text != MODULE
    (tmp_path / "brought_parts.py").write_text(text)
    monkeypatch.delitem(sys.modules, "brought_parts")
    with pytest.raises(CheckpointError, match=r"code of .*changed"):
        run(*words, **longer)
    (tmp_path / "brought_parts.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "brought_parts")
    assert run(*words, **longer).summary["rounds"] == 3


@pytest.mark.long
def test_a_run_wants_the_same_objects_again(mine: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(attack=mine.Louder(share=0.5), folder=folder)
    longer: dict[str, Any] = {"folder": folder, "resume": True, "rounds": 3}
    with pytest.raises(CheckpointError, match=r"attack\.times"):
        run(attack=mine.Louder(share=0.5, times=5.0), **longer)
    assert run(attack=mine.Louder(share=0.5), **longer).summary["rounds"] == 3


def test_help_lists_the_keys_of_a_part_of_ones_own(mine: Any) -> None:
    text = keys_of("method", "brought_parts:Method")
    assert "method.boost=1.0" in text
    assert "method.rank=8" in text


@pytest.mark.parametrize("kind", ["local.extras", "attack", "local.settings", "method"])
@pytest.mark.long
def test_ray_has_the_bits_of_parts_of_ones_own(mine: Any, kind: str) -> None:
    make, words = KINDS[kind]
    wanted = digest(run(*words, engine="inline"))
    ray = {"engine": {"name": "ray", "workers": 1, "chunk": 1}}
    assert digest(run(*words, **ray)) == wanted
    assert digest(run(**make(mine), **ray)) == wanted


def test_settings_of_a_part_are_checked_like_those_of_the_project(mine: Any) -> None:
    config = from_plain(composed(["local.extras=[brought_parts:Decay]"]), METHODS)
    assert [type(extra).__name__ for extra in config.local.added] == ["Decay"]
    assert config.digested["local"]["extras"] == ["brought_parts:Decay"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (LocalSettings, "rate"),
        (ClientProgram, "sent"),
        (Attack, "attackers"),
        (FedRacLora, "update"),
    ],
)
def test_a_field_in_the_place_of_a_method_is_refused(base: type, name: str) -> None:
    """It would be called, far from here."""
    with pytest.raises(ConfigError, match=rf"Mine has a field {name}, .*\.{name} is a method"):
        type("Mine", (base,), {"__annotations__": {name: float}, name: 0.1})
