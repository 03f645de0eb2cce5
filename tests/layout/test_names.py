"""A top-level name means one thing: in how many modules it is defined."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fedraclora", "strategies", "clients", "experiments")
ELSEWHERE = ROOT / "experiments" / "bench" / "peers"  # in environments of their own
# What a method is told of a round, and what a training function is: users write both names.
OF_USERS = {"Round": {"strategies/shared/layer.py", "fedraclora/training/own/round.py"}}

Tree = tuple[Path, ast.Module]
Definition = tuple[Path, ast.stmt]


def project() -> list[Tree]:
    paths = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
    return [(p, ast.parse(p.read_text())) for p in paths if ELSEWHERE not in p.parents]


def taken(trees: list[Tree]) -> set[str]:
    """What modules take from each other, as ``module.name``, by the last part of the module."""
    found = set()
    for _, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = node.module.rpartition(".")[2]
                found |= {f"{module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found.add(f"{node.value.id}.{node.attr}")
    return found


def defined(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Public names that a module defines, without its logger, type variables and other names."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            made = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
            if made.rpartition(".")[2] in {"getLogger", "TypeVar"}:
                continue
            yield from ((t.id, node) for t in targets if isinstance(t, ast.Name))


def is_interface(definitions: list[Definition]) -> bool:
    """Functions that take the same: one is called in the place of another."""
    takes = {ast.unparse(n.args) if isinstance(n, ast.FunctionDef) else "" for _, n in definitions}
    return len(takes) == 1 and takes != {""}


def module(path: Path) -> str:
    return path.parent.name if path.stem == "__init__" else path.stem


def twice(trees: list[Tree]) -> dict[str, list[str]]:
    """Names that several modules define, with these modules.

    A definition counts where another module takes it: only there can one be had for the other.
    Nothing that begins with an underscore counts, nor what is an interface.
    """
    imports = taken(trees)
    places: dict[str, list[Definition]] = defaultdict(list)
    for path, tree in trees:
        for name, node in defined(tree):
            if not name.startswith("_") and f"{module(path)}.{name}" in imports:
                places[name].append((path, node))
    return {
        name: sorted(str(p.relative_to(ROOT)) for p, _ in definitions)
        for name, definitions in sorted(places.items())
        if len({p for p, _ in definitions}) > 1 and not is_interface(definitions)
    }


@pytest.mark.slow
def test_no_name_comes_to_mean_a_second_thing() -> None:
    found = {
        name: paths for name, paths in twice(project()).items() if {*paths} != OF_USERS.get(name)
    }
    assert not found, f"give one of them another name, or a leading underscore: {found}"


def test_the_finder_tells_a_second_meaning_from_an_interface() -> None:
    a = "log = getLogger(1)\nONE = 1\nTWO = 2\ndef f(x): ...\ndef g(x): ...\nclass C: ..."
    b = "log = getLogger(2)\nONE = 1\nTWO = 2\ndef f(x): ...\ndef g(y): ...\nC = int"
    users = [
        "from house.a import TWO, C, ONE, f, g, log",
        "from house import b\nb.f, b.TWO, b.g(b.C, b.log)",
    ]
    trees = [(ROOT / f"{n}.py", ast.parse(t)) for n, t in zip("abcd", (a, b, *users), strict=True)]
    assert [*twice(trees)] == ["C", "TWO", "g"]
