"""Objects that a user brings: found by name, made with their parameters, known by what they are."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedraclora.binding import bind, object_of
from fedraclora.errors import ConfigError
from fedraclora.object_registry import (
    code_digests,
    is_named,
    named_by,
    object_digest,
    register_object,
)

MODULE = """
from dataclasses import dataclass

LIMIT = 3
OTHERS = {"b", "a", "c"}

def twice(x, *, by: float = 2.0):
    return helper(x) * by if x in {"p", "q", "r"} or x < LIMIT else x

def helper(x):
    return x + len(OTHERS)

@dataclass(frozen=True)
class Scaled:
    by: float = 1.0

    def __call__(self, x):
        return self.by * x

made = Scaled(5.0)
number = 7
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def write(text: str = MODULE) -> None:
        (tmp_path / "brought.py").write_text(text)
        monkeypatch.delitem(sys.modules, "brought", raising=False)

    write()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return write


def test_a_value_gives_the_object_that_it_names_with_its_parameters(module: Any) -> None:
    assert object_of("loss", "brought:twice")(1) == 8
    assert object_of("loss", {"name": "brought:twice", "by": 3})(1) == 12
    assert object_of("loss", {"name": "brought:Scaled", "by": 4})(2) == 8
    assert object_of("loss", "brought:made")(2) == 10
    scaled = object_of("loss", "brought:made")
    assert object_of("step", {"name": "brought:Scaled", "by": 4}, type(scaled)).by == 4
    assert object_of("loss", register_object(scaled)) is scaled
    assert [*filter(is_named, ("cross_entropy", "folder/a.npz", "C:/a", "a@b"))] == []


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ("brought:number", None, "loss=brought:number.* type int, expected a function"),
        ("brought:nothing", None, "has no nothing"),
        ({"name": "brought:twice", "bi": 2}, None, "loss.bi.*did you mean 'loss.by'"),
        ({"name": "brought:twice", "by": "two"}, None, "loss.by='two': expected float"),
        ({"name": "brought:made", "by": 2}, None, "by, but it is .* Scaled"),
        ("brought:twice", Path, "loss.x is missing"),
        ("brought:Scaled", Path, "class Scaled.* pathlib"),
        ("brought:made", Path, "type Scaled.* pathlib"),
        ("Mine@0123456789abcdef", None, "loss, of digest Mine@.*does not have"),
        (7, None, "loss=7 .*type int"),
    ],
)
def test_a_value_that_names_something_else_is_refused(
    module: Any, value: object, kind: type | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        object_of("loss", value, kind)


def test_a_class_of_the_users_is_a_row_of_a_table_of_such_classes(module: Any) -> None:
    @dataclass(frozen=True)
    class Base:
        share: float = 0.0

    class Mine(Base):
        pass

    table = {"base": Base}
    assert bind("attack", table, {"name": register_object(Mine), "share": 0.5})() == Mine(0.5)
    with pytest.raises(ConfigError, match=r"unknown key 'attack\.shares'"):
        bind("attack", table, {"name": register_object(Mine), "shares": 0.5})
    own = Mine(0.25)
    assert bind("attack", table, {"name": register_object(own)})() is own
    with pytest.raises(ConfigError, match=r"class Scaled.*expected a class .*Base"):
        bind("attack", table, {"name": "brought:Scaled"})
    assert bind("partition", {"a": len}, {"name": "brought:twice", "x": 1})() == 8  # type: ignore[arg-type]


@pytest.mark.slow
def test_another_process_has_the_same_digests_and_loads_no_entry_points(
    module: Any, tmp_path: Path
) -> None:
    """The bundle of a deployment has none, and a module of the user's takes its classes here."""
    line = "import sys, fedraclora, brought as b\n"
    line += "from fedraclora.object_registry import object_digest as f"
    line += "\nfedraclora.RoundStep, fedraclora.Callback\nprint(f(b.twice), f(b.made), *(name for "
    line += "name in sys.modules if name.split('.')[1:2] in (['commands'], ['compose'])))"
    env = {"PYTHONHASHSEED": "7", "PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}"}
    told = subprocess.run(
        [sys.executable, "-c", line], capture_output=True, text=True, check=True, env=env
    ).stdout.split()
    import brought  # type: ignore[import-not-found]

    assert told == [object_digest(brought.twice), object_digest(brought.made)]
    assert code_digests({"a": {"loss": "brought:twice"}}) == {"brought:twice": told[0]}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x + len", "x - len"),  # of a function that it calls
        ("LIMIT = 3", "LIMIT = 4"),
        ("by: float = 2.0", "by: float = 3.0"),
        ('"p", "q"', '"p", "s"'),
    ],
)
def test_a_changed_function_has_another_digest(module: Any, old: str, new: str) -> None:
    before = object_digest(object_of("loss", "brought:twice"))
    module("# a comment\n" + MODULE)
    assert object_digest(object_of("loss", "brought:twice")) == before
    module(MODULE.replace(old, new))
    assert object_digest(object_of("loss", "brought:twice")) != before


def test_an_object_counts_with_all_that_it_holds() -> None:
    class Holds:
        def __init__(self, value: object) -> None:
            self.value, self._seen = value, 0

    def holding(value: object) -> Any:
        return lambda: value

    values: list[object] = [1, [1], {"a": 1}, {1}, torch.ones(2), np.ones(2), holding, Holds]
    values += [torch.zeros(2), np.zeros(2), partial(holding, 1)]
    values += [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)]  # of other weights
    assert len({object_digest(Holds(value)) for value in values}) == len(values)
    assert len({object_digest(holding(value)) for value in values}) == len(values)
    one = Holds(1)
    before = object_digest(one)
    one._seen += 1
    assert object_digest(one) == before
    one.value = one
    assert object_digest(one) != before


def test_a_module_that_a_function_holds_counts_by_its_name() -> None:
    """A library in a closure would be walked through, with all that it imports."""
    held = types.ModuleType("held")

    def made(module: types.ModuleType) -> Any:
        return lambda: module

    before = object_digest(made(held))
    held.value = 3  # type: ignore[attr-defined]
    assert object_digest(made(held)) == before
    assert object_digest(made(types.ModuleType("other"))) != before


def test_objects_of_a_program_are_found_in_its_config() -> None:
    config = {"local": {"extras": [{"name": register_object(len)}]}, "seed": 0}
    assert named_by(config) == {register_object(len): len}


HELPER = """
CONSTANT = 3
rates = {"a": 0.1}
rate = 0.1

def scale(x):
    return x * CONSTANT
"""
SEEN = """
import functools
import math
import helper
from helper import rates as taken

seen = []
count = 0
weight = 0.5
table = {"a": [1, 2]}
table["b"] = base = [weight]

def made_of(x):
    return {"x": x}

inner = made_of(weight)

class Helper:
    sizes = [1, 2]

    def __init__(self, by):
        self.by = by

    def step(self, x):
        return x * self.by

stepper = Helper(2.0)

def by(factor):
    def wrap(function):
        @functools.wraps(function)
        def called(x):
            return factor * function(x)
        return called
    return wrap

@by(3.0)
def decorated(x):
    return x + 1

def train(x):
    global count
    import late
    count += 1
    seen.append(x)
    found = stepper.step(x) + weight + len(table) + inner["x"] + math.pi + decorated(x)
    return found + helper.CONSTANT + helper.scale(x) + helper.rates["a"] + taken["a"] + late.value
"""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write the modules of a user, and give the digest of its training function."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    texts = {"seen": SEEN, "helper": HELPER, "late": "value = 1\n"}

    def digest(name: str = "seen", old: str = "", new: str = "") -> str:
        for module, text in texts.items():
            file = tmp_path / f"{module}.py"
            file.write_text(text.replace(old, new) if (module == name and old) else text)
            monkeypatch.delitem(sys.modules, module, raising=False)
        return object_digest(importlib.import_module("seen").train)

    return digest


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("seen", "weight = 0.5", "weight = 0.6"),
        ("seen", '"a": [1, 2]', '"a": [1, 3]'),
        ("seen", 'table["b"]', 'table["c"]'),
        ("seen", "self.by\n", "self.by + 1\n"),
        ("seen", "x * self.by", "x / self.by"),
        ("seen", "Helper(2.0)", "Helper(3.0)"),
        ("seen", "sizes = [1, 2]", "sizes = [2, 2]"),
        ("seen", '{"x": x}', '{"x": 2 * x}'),
        ("seen", "@by(3.0)", "@by(4.0)"),
        ("seen", "factor * function", "factor + function"),
        ("helper", "CONSTANT = 3", "CONSTANT = 4"),
        ("helper", "x * CONSTANT", "x - CONSTANT"),
        ("helper", '"a": 0.1', '"a": 0.2'),
        ("late", "value = 1", "value = 2"),
    ],
)
def test_what_a_function_names_in_the_users_modules_counts(
    seen: Any, name: str, old: str, new: str
) -> None:
    """A run went on with other numbers: lower-case names and other modules did not count."""
    before = seen()
    assert seen(name, old, new) != before
    assert seen() == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("helper", "rate = 0.1", "rate = 0.2"),  # which nobody uses
        ("seen", "import math", "import math  # a comment"),
        ("seen", "count = 0", "count = 0\nother = 5"),
    ],
)
def test_what_it_does_not_name_does_not_count(seen: Any, name: str, old: str, new: str) -> None:
    assert seen(name, old, new) == seen()


def test_what_a_run_changes_in_a_module_does_not_count(seen: Any) -> None:
    """A list that is appended to and a counter are no other function where the run goes on."""
    before, module = seen(), sys.modules["seen"]
    module.train(2.0)
    module.table["z"] = 1
    assert module.count == 1
    assert object_digest(module.train) == before
    module.weight = 0.75
    assert object_digest(module.train) != before


@pytest.mark.slow
def test_another_process_digests_the_same_of_what_is_named(seen: Any, tmp_path: Path) -> None:
    line = "import seen; from fedraclora.object_registry import object_digest as f\n"
    line += "print(f(seen.train))"
    env = {"PYTHONHASHSEED": "7", "PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}"}
    before = seen()
    done = subprocess.run(
        [sys.executable, "-c", line], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split() == [before]
