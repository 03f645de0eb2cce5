"""No test holds the full wording of an error: the key, the value and the remedy are enough."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Words in a row of what a test looks for in an error; a wildcard ends the row.
MOST_WORDS = 4
WILDCARD = re.compile(r"\.[*+]|\\[dwsS][*+]?|\[[^\]]*\][*+]|(?<!\\)\||\n")
WORD = re.compile(r"[^\s]*[A-Za-z]{2}[^\s]*")
# Attributes and columns that hold what a command or a failed client complained of.
HOLD = {"err", "stderr", "reason"}

Named = dict[str, list[ast.AST]]


def longest_row(text: str) -> int:
    return max(len(WORD.findall(part)) for part in WILDCARD.split(text))


def texts(node: ast.AST) -> Iterator[str]:
    """The texts of an expression; what is put into one is a wildcard there."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(v.value) if isinstance(v, ast.Constant) else ".*" for v in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = ([*texts(side)] or [".*"] for side in (node.left, node.right))
        yield from (a + b for a in left for b in right)
    else:
        yield from chain.from_iterable(map(texts, ast.iter_child_nodes(node)))


def names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def speaks(node: ast.AST, held: set[str]) -> bool:
    """Whether an expression holds what an error says."""
    return bool(names(node) & held or looked_into(node) & HOLD)


def looked_into(node: ast.AST) -> set[str]:
    """Attributes and columns that an expression takes."""
    inside = list(ast.walk(node))
    keys = (n.slice for n in inside if isinstance(n, ast.Subscript))
    columns = {k.value for k in keys if isinstance(k, ast.Constant) and isinstance(k.value, str)}
    return columns | {n.attr for n in inside if isinstance(n, ast.Attribute)}


def complaints(function: ast.AST) -> set[str]:
    """Names of a test that hold an error, or what was made of it; and the streams it reads."""
    held = looked_into(function) & HOLD
    for node in ast.walk(function):
        if isinstance(node, ast.withitem) and node.optional_vars is not None:
            if "raises" in ast.unparse(node.context_expr):
                held |= names(node.optional_vars)
        elif isinstance(node, ast.Assign) and speaks(node.value, held):
            held |= set().union(*map(names, node.targets))
    return held


def looked_for(function: ast.AST) -> Iterator[ast.AST]:
    """Patterns, and the other sides of comparisons with an error."""
    held = complaints(function)
    for node in ast.walk(function):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Call):
            yield from (k.value for k in node.keywords if k.arg == "match")
            sides = [node.func, *node.args] if held else []
        elif held and isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        if any(speaks(side, held) for side in sides):
            yield from (side for side in sides if not speaks(side, held))


def assigned(node: ast.AST) -> Named:
    """What names are set to by assignments, and by the rows of a test's parameters."""
    found: Named = {}
    for part in ast.walk(node):
        if isinstance(part, ast.Assign):
            for target in part.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(part.value)
        elif isinstance(part, ast.Call) and getattr(part.func, "attr", "") == "parametrize":
            keys = re.findall(r"\w+", " ".join(texts(part.args[0])))
            for row in getattr(part.args[1], "elts", part.args[1:]):
                row_of = getattr(row, "args", None) or getattr(row, "elts", None)
                for key, cell in zip(
                    keys, row_of if len(keys) > 1 and row_of else [row], strict=False
                ):
                    found.setdefault(key, []).append(cell)
    return found


def handed_on(tree: ast.Module) -> Named:
    """What helpers of a file that look for their argument are called with, by helper.argument."""
    found: Named = {}
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        for place, value in enumerate(call.args):
            found.setdefault(f"{getattr(call.func, 'id', '')}.{place}", []).append(value)
    return found


def pinned(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and text of what holds more words of an error in a row than a test should."""
    found = set()
    outside, calls = assigned(ast.Module(tree.body, [])), handed_on(tree)
    constants = {
        n for s in tree.body if isinstance(s, ast.Assign) for t in s.targets for n in names(t)
    }
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        given = {n: v for n, v in outside.items() if n in constants} | assigned(function)
        for place, argument in enumerate(function.args.args):
            given.setdefault(argument.arg, calls.get(f"{function.name}.{place}", []))
        for node in looked_for(function):
            for part in (node, *(p for name in names(node) for p in given.get(name, []))):
                line = getattr(part, "lineno", function.lineno)
                found |= {(line, t) for t in texts(part) if longest_row(t) > MOST_WORDS}
    return sorted(found)


def test_no_test_holds_the_full_wording_of_an_error() -> None:
    paths = sorted((ROOT / "tests").rglob("*.py"))
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in paths
        for line, text in pinned(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(["leave key, value and remedy, with .* between them:", *found])


FULL = "lr is 0; a positive number is wanted"
SHORT = r"lr is 0.*positive number"


@pytest.mark.parametrize(
    "source",
    [
        "def test_x():\n with raises(E, match={}): f()",
        "def test_x():\n with raises(E) as error: f()\n assert {} in str(error.value)",
        "def test_x(c):\n told = c.readouterr().err\n assert told == {}",
        "def test_x(c):\n assert re.search({}, c.readouterr().err)",
        "def test_x(row):\n assert row['reason'] == {}",
        "W = {}\ndef test_x():\n with raises(E, match=W): f()",
        "@mark.parametrize(('a', 'b'), [(1, {})])\ndef test_x(b):\n with raises(E, match=b): f()",
        "@mark.parametrize('b', [{}])\ndef test_x(b):\n with raises(E, match=b): f()",
        "@mark.parametrize('b', [param({}, id=1)])\ndef test_x(b):\n with raises(E, match=b): f()",
        "def refused(b):\n with raises(E, match=b): f()\ndef test_x():\n refused({})",
    ],
)
def test_a_sentence_is_seen_wherever_it_stands(source: str) -> None:
    assert [text for _, text in pinned(ast.parse(source.format(repr(FULL))))] == [FULL]
    assert pinned(ast.parse(source.format(repr(SHORT)))) == []
