"""A method is a plug-in: nothing but its file knows it, and one from outside can do the same.

That nobody imports one is a contract of imports (`plug_ins`).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fedraclora
from fedraclora.protocol.program import ClientProgram
from fedraclora.strategies.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fedraclora", "strategies", "clients", "experiments")
FILES = sorted({kind.__module__.rpartition(".")[2] for kind in METHODS.values()})


@cache
def sources() -> dict[Path, str]:
    """Every module of the project by its file, links left out."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            inside = path.relative_to(ROOT)
            linked = inside.parts[0] == "fedraclora" and inside.parts[1] in PACKAGES
            if not linked and "results" not in inside.parts:
                found[path] = path.read_text(encoding="utf-8")
    return found


@cache
def words() -> dict[Path, Counter[str]]:
    """How often each identifier stands in the code of each module."""
    return {path: Counter(identifiers(ast.parse(text))) for path, text in sources().items()}


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Names that are defined, read or imported, and texts that may be one."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name"):
            if isinstance(found := getattr(node, field, None), str):
                yield found.rpartition(".")[2]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def file_of(name: str) -> Path:
    return ROOT / "strategies/methods" / f"{name}.py"


def defined(path: Path) -> set[str]:
    """Names of the functions, parameters, classes, methods, fields and constants of a module."""
    found: set[str] = set()
    for node in ast.parse(sources()[path]).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        for each in (node, *inner):
            if isinstance(each, ast.FunctionDef | ast.ClassDef):
                found.add(each.name)
            if isinstance(each, ast.FunctionDef):
                found |= {arg.arg for arg in (*each.args.args, *each.args.kwonlyargs)}
            targets = each.targets if isinstance(each, ast.Assign) else [getattr(each, "target", 0)]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("__") and len(name) > 1}


@cache
def fields_of(path: Path) -> set[str]:
    """Names of the fields of the dataclasses of a module."""
    classes = (node for node in ast.parse(sources()[path]).body if isinstance(node, ast.ClassDef))
    inner = (node for kind in classes for node in kind.body if isinstance(node, ast.AnnAssign))
    return {node.target.id for node in inner if isinstance(node.target, ast.Name)}


# What shared code defines and a single method uses besides, and why it stands there.
ONE_USER = {
    "fedraclora/sketch/__init__.py": {"sparse_sign"},  # a law of drawings, in the table of them
    "fedraclora/training/extras/pairs.py": {"projected"},  # of local.precondition
    "fedraclora/training/optimizer.py": {"_of_kind"},  # for an optimizer that derives from it
    "strategies/shared/factors.py": {"Label", "OTHER"},  # of two keys
    "strategies/shared/layerwise.py": {"LowRankMethod", "keeps", "subset"},  # what a method may say
    "strategies/shared/past.py": {"Change", "framed"},  # beside `factor`, which CONTRIBUTING shows
    # What one of a family of three may say.
    "strategies/shared/walking.py": {
        "DirectionProgram",
        "applied_moves",
        "by_direction",
        "check_walk",
        "choose_directions",
    },
}


@pytest.mark.slow
def test_nothing_is_shared_that_a_method_alone_uses() -> None:
    of_methods = {file_of(name) for name in FILES}
    code = {p for p in sources() if p.relative_to(ROOT).parts[0] != "experiments"}
    found: dict[str, set[str]] = {}
    for path in code - of_methods:
        for name in defined(path):
            users = {other for other in code - {path} if words()[other][name]}
            users -= {other for other in users & of_methods if name in fields_of(other)}
            if len(users) == 1 and users <= of_methods:
                found.setdefault(path.relative_to(ROOT).as_posix(), set()).add(name)
    only = {path: names - ONE_USER.get(path, set()) for path, names in found.items()}
    only = {path: names for path, names in only.items() if names}
    assert not only, (
        f"one method alone uses {only} of shared code. Move them to the file of the method, or, if "
        "any method may use them, add them to ONE_USER with the reason. An equal text counts "
        "as a use: then choose another"
    )
    # A second method may use a name of the list: it then only has to exist.
    lost = {path: names - defined(ROOT / path) for path, names in ONE_USER.items()}
    assert not any(lost.values()), f"ONE_USER lists names that are not defined: {lost}"


AUTHORS = ROOT / "experiments/authors"  # where a method is compared with others' code of it


@pytest.mark.slow
def test_each_client_program_is_in_the_file_of_its_method_or_serves_several() -> None:
    for name, kind in ClientProgram.known.items():
        home = kind.__module__
        if not home.startswith("fedraclora.strategies.methods."):
            continue
        found = [p for p, n in words().items() if n[kind.__qualname__]]
        users = [p.stem for p in found if p.parent != AUTHORS]
        assert users == [home.rpartition(".")[2]], name


# ---- Names of methods in shared code ------------------------------------------------------------

# Lines of shared code that name a method: where, how many, and why.
NAMED = {
    "fedraclora/__init__.py": (1, "the project has the name of its method"),
    "fedraclora/api.py": (2, "how an instance is made, and an example that runs"),
    "fedraclora/client.py": (1, "an example that runs"),
    "fedraclora/commands/compare/command.py": (1, "an example in the help"),
    "fedraclora/flower/server.py": (1, "how an instance is made"),
}
# The same word for something else.
OTHERS = {
    "fedraclora/data/": ("cola", "fedslop"),  # a task of GLUE, and a partition
    "fedraclora/flower/": ("fedavg",),  # a class of Flower
    "fedraclora/training/": ("relora",),  # a schedule of local training
}
GENERIC = {"lora", "full"}  # names of methods that are words of the field
MOST = 20


def plain(name: str) -> str:
    """A name as it is told from others, however it is written."""
    return re.sub(r"[_-]", "", name).lower()


@cache
def names_of_methods() -> set[str]:
    kinds = {kind.__name__ for kind in METHODS.values()}
    return {plain(name) for name in {*METHODS, *kinds}} - GENERIC


def naming(path: Path) -> int:
    """How many lines of a file name a method."""
    inside = path.relative_to(ROOT).as_posix()
    others = {word for where, words in OTHERS.items() if inside.startswith(where) for word in words}
    known = names_of_methods() - others
    lines = path.read_text(encoding="utf-8").replace("fedraclora", "").splitlines()
    return sum(any(plain(w) in known for w in re.findall(r"\w[\w-]*", line)) for line in lines)


def test_shared_code_names_a_method_nowhere_but_where_it_is_listed() -> None:
    code = [p for p in sources() if p.relative_to(ROOT).parts[0] != "experiments"]
    shared = [p for p in code if p.parent != ROOT / "strategies/methods"]
    found = {p.relative_to(ROOT).as_posix(): n for p in shared if (n := naming(p))}
    assert found == {where: count for where, (count, _) in NAMED.items()}
    assert sum(found.values()) <= MOST


# ---- A method from outside ------------------------------------------------------------------


def copied(folder: Path, method: str) -> Any:
    """Import a copy of a method's file as a user's module, with names of its own in messages."""
    module = f"outside_{method}"
    text = file_of(method).read_text(encoding="utf-8")
    text, count = re.subn(
        r'^    name = "([\w.]+)"', r'    name = "outside.\1"', text, flags=re.MULTILINE
    )
    assert count
    (folder / f"{module}.py").write_text(text, encoding="utf-8")
    return import_module(module)


OUTSIDE = {
    "ferret": ("Ferret", {"directions": 8}),
    "fedkseed": ("FedKSeed", {"seeds": 16, "steps": 3}),
    "ravan": ("Ravan", {"rank": 2, "heads": 2}),
    "galore_average": ("GaloreAverage", {"rank": 2}),
    "pool_rac_lora": ("PoolRacLora", {"rank": 2, "pool": 2}),
}
SMALL = ["clients=4", "clients_per_round=3", "rounds=4", "pretrain=none", "local.lr=0.01"]


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {*sys.modules}, dict(ClientProgram.known)
    yield tmp_path
    for module in {*sys.modules} - before[0]:
        if module.startswith("outside_"):
            del sys.modules[module]
    ClientProgram.known.clear()
    ClientProgram.known.update(before[1])


def digest_of(method: Any, *words: str) -> str:
    done = fedraclora.simulate(*SMALL, *words, "output.progress=false", method=method)
    return str(done.summary["weights_digest"])


@pytest.mark.slow
@pytest.mark.parametrize("method", OUTSIDE)
def test_a_module_of_the_users_own_has_the_bits_of_the_method_that_it_copies(
    method: str, beside: Path
) -> None:
    name, given = OUTSIDE[method]
    own = getattr(copied(beside, method), name)(**given)
    ours = getattr(import_module(f"fedraclora.strategies.methods.{method}"), name)(**given)
    assert type(own) is not type(ours)
    assert digest_of(own) == digest_of(ours)


@pytest.mark.long
@pytest.mark.parametrize("method", ["ferret", "pool_rac_lora"])
def test_so_it_has_on_workers_that_read_messages(method: str, beside: Path) -> None:
    name, given = OUTSIDE[method]
    own = getattr(copied(beside, method), name)(**given)
    ours = getattr(import_module(f"fedraclora.strategies.methods.{method}"), name)(**given)
    assert digest_of(own, "engine=ray", "engine.workers=2") == digest_of(ours)


NOISE = """
from dataclasses import dataclass

import torch

import fedraclora
from fedraclora.protocol.program import GradientStage
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora


@dataclass(frozen=True)
class Noise(fedraclora.ClientProgram, group="method"):
    name = "outside.noise"

    std: float

    def hooks(self, chunk):
        return {GradientStage.PROGRAM: lambda g, _: {n: 0 * t for n, t in g.items()}}

    def upload(self, chunk, before, after):
        found = {}
        for name, value in after.items():
            rngs = [generator(chunk.seed, name, chunk.round_, k) for k in chunk.clients.tolist()]
            drawn = [torch_normal(rng, *value.shape[1:]) for rng in rngs]
            found[name] = value + self.std * torch.stack(drawn).to(value)
        return found


@dataclass(frozen=True)
class Noisy(FedRacLora):
    std: float = 0.01

    def program(self, plan):
        return Noise(self.std)
"""


@pytest.mark.slow
def test_a_program_draws_noise_for_each_client_whoever_is_in_its_chunk(beside: Path) -> None:
    (beside / "outside_noise.py").write_text(NOISE)
    noisy = import_module("outside_noise").Noisy
    alone, together = "engine=inline", "engine=vectorized"
    found = {digest_of(noisy(rank=2), engine) for engine in (alone, together, together)}
    assert len(found) == 1
    assert digest_of(noisy(rank=2, std=0.02), together) not in found
    assert digest_of(noisy(rank=2), together, "seed=2") not in found


MAIN = """
from dataclasses import dataclass

import fedraclora
from fedraclora.protocol.program import GradientStage
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora


@dataclass(frozen=True)
class Halved(fedraclora.ClientProgram, group="method"):
    name = "halved"
    numbers: tuple[float, ...] = (0.5, 0.5, 0.5)

    def hooks(self, chunk):
        assert len(chunk.values) and chunk.round_
        return {GradientStage.PROGRAM: lambda g, _: {n: self.numbers[0] * t for n, t in g.items()}}


@dataclass(frozen=True)
class Mine(FedRacLora):
    def program(self, plan):
        return Halved()


if __name__ == "__main__":
    words = "clients=4", "clients_per_round=3", "rounds=2", "pretrain=none", "output.progress=false"
    for engine in ([], ["engine=ray", "engine.workers=2"]):
        run = fedraclora.simulate(*words, *engine, method=Mine(rank=2))
        print(run.summary["weights_digest"], run.rows[-1]["downlink_bytes"])
    other = fedraclora.simulate(*words, method=FedRacLora(rank=2))
    print(other.summary["weights_digest"], other.rows[-1]["downlink_bytes"])
"""


@pytest.mark.long
def test_a_program_of_the_main_program_goes_to_workers_and_its_numbers_are_counted(
    tmp_path: Path,
) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    here, ray, plain = (line.split() for line in done.stdout.split("\n")[-4:-1])
    assert here == ray
    assert here[0] != plain[0]
    assert int(here[1]) == int(plain[1]) + 3 * 8 * 3  # three numbers to each of three clients
