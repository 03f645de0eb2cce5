"""Find the names that a user's code uses, from its bytecode and file, without running it."""

from __future__ import annotations

import ast
import dis
import importlib.util
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

LOADS, ATTRIBUTES = {"LOAD_GLOBAL", "LOAD_NAME"}, {"LOAD_ATTR", "LOAD_METHOD"}
Statements = list[ast.stmt]


def names_of(code: types.CodeType) -> set[tuple[str, ...]]:
    """List the globals that code reads, each with the attributes that it takes of it.

    Example:
        >>> sorted(names_of(compile("a.b.c(d)", "", "eval")))
        [('a', 'b', 'c'), ('d',)]
    """
    found, chain = set[tuple[str, ...]](), tuple[str, ...]()
    for step in dis.get_instructions(code):
        if chain and step.opname in ATTRIBUTES:
            chain = (*chain, step.argval)
            continue
        found |= {chain} if chain else set()
        chain = (step.argval,) if step.opname in LOADS else ()
    for inner in code.co_consts:
        found |= names_of(inner) if isinstance(inner, types.CodeType) else set()
    return found


def imports_of(code: types.CodeType) -> set[str]:
    """List the modules that code imports when it runs."""
    found = {s.argval for s in dis.get_instructions(code) if s.opname == "IMPORT_NAME"}
    for inner in code.co_consts:
        found |= imports_of(inner) if isinstance(inner, types.CodeType) else set()
    return found


def file_of(name: str) -> Path | None:
    """Find the file of a module without importing it or its package; None if it has none."""
    first, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    if not rest:
        return Path(spec.origin)
    place = Path(spec.origin).parent.joinpath(*rest)
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def text_of(file: Path) -> str:
    """Write a file's code without comments and layout; empty if it cannot be read."""
    tree = _tree(str(file), _changed(file))
    return "" if tree is None else ast.dump(tree)


def statements_of(module: types.ModuleType, name: str, scope: str = "") -> Statements:
    """List the statements of a module, or of a class in it, that set a name.

    Args:
        module: The module.
        name: Empty: all that are no functions, classes and docstrings.
        scope: The qualified name of the class.
    """
    tree = _tree(file := getattr(module, "__file__", None) or "", _changed(Path(file)))
    body: Any = [] if tree is None else tree.body
    for part in filter(None, scope.split(".")):
        inner = [n for n in body if isinstance(n, ast.ClassDef) and n.name == part]
        body = inner[-1].body if inner else []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Expr)
    plain = [node for node in body if not isinstance(node, kinds)]
    return [node for node in plain if not name or name in _bound(node)]


def is_state(module: types.ModuleType, name: str) -> bool:
    """Check whether a function of a module changes one of its globals (``global``)."""
    tree = _tree(file := getattr(module, "__file__", None) or "", _changed(Path(file)))
    nodes = ast.walk(tree) if tree is not None else ()
    return any(isinstance(node, ast.Global) and name in node.names for node in nodes)


def used_in(nodes: Statements) -> list[tuple[str, ...]]:
    """List the names that statements read, without attributes."""
    names = (each for node in nodes for each in ast.walk(node) if isinstance(each, ast.Name))
    return sorted({(name.id,) for name in names if isinstance(name.ctx, ast.Load)})


def _bound(node: ast.stmt) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            yield each.id
        elif isinstance(each, ast.alias):
            yield (each.asname or each.name).partition(".")[0]
        elif isinstance(each, ast.Subscript | ast.Attribute) and isinstance(each.ctx, ast.Store):
            inner: ast.expr = each  # table["a"] = 1 changes the table
            while isinstance(inner, ast.Subscript | ast.Attribute):
                inner = inner.value
            yield from [inner.id] if isinstance(inner, ast.Name) else []


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns if file.suffix == ".py" else 0
    except OSError:
        return 0


@cache
def _tree(file: str, changed: int) -> ast.Module | None:
    if not changed:
        return None
    try:
        return ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return None
