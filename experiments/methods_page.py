"""What the pages say of the methods: by their docstrings, traits, YAML and results.

``python -m fedraclora.experiments.pages`` brings it there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from fedraclora.config.schema import bind
from fedraclora.experiments.choices import choice, groups
from fedraclora.experiments.study.entries import docstring, is_unverified
from fedraclora.experiments.tables import Table, read_table
from fedraclora.protocol.method import Method
from fedraclora.strategies import METHODS

SERVERS = "servers/README.md"  # seconds of a server, one matrix of 4096 x 4096


def board(name: str, results: Path) -> str:
    """Render the leaderboard of a study with its figure, or say that it has not run.

    It is for a page in docs/records.

    Args:
        name: Of the study.
        results: The folder of all results.
    """
    folder = results / name
    command = f"`fedraclora compare experiment={name} out=experiments/results/{name}`"
    if not (folder / "leaderboard.md").is_file():
        return f"Not run yet: {command}.\n"
    text = (folder / "leaderboard.md").read_text(encoding="utf-8")
    picture = f"![leaderboard](../../experiments/results/{name}/leaderboard.png)"
    return f"{text}\nBy {command}.\n\n{picture}\n"


def methods(results: Path) -> str:
    """Render a table of all methods, and of each file its formulas, what goes up, and the source.

    Args:
        results: The folder of all results.
    """
    kinds: dict[type[Method], list[str]] = {}
    for name, kind in METHODS.items():
        kinds.setdefault(kind, []).append(name)
    costs = {row["method"]: row["close CPU s"] for row in read_table(results / SERVERS)}
    text = [_overview(costs).markdown()]
    text += [_section(kind, names) for kind, names in kinds.items()]
    return "\n".join(text)


def method_of(name: str) -> Method:
    """Make a method as ``method=name`` has it."""
    return bind("method", METHODS, choice("method", name))()


@cache
def aliases() -> Mapping[str, str]:
    """List the names that stand for the settings of another name: name -> the other."""
    first: dict[Method, str] = {}
    found = {name: first.setdefault(method_of(name), name) for name in METHODS}
    return {name: other for name, other in found.items() if name != other}


def _overview(costs: Mapping[str, str]) -> Table:
    lines = groups()["method"]
    records = []
    for name, kind in METHODS.items():
        method = method_of(name)
        traits = method.traits
        flags = {
            "exact": traits.exact,
            "linear": traits.linear,
            "rank budgets": traits.ranks,
            "keeps state at clients": method.client_state,
        }
        title, _, what = lines[name].partition(": ")
        records.append(
            {
                "`method=`": f"`{name}`" + (" †" if is_unverified(kind) else ""),
                "what it does": (what or title).rstrip("."),
                **{trait: "yes" if has else "no" for trait, has in flags.items()},
                "server CPU s": costs.get(name, ""),
            }
        )
    return Table.of(records)


def _section(kind: type[Method], names: list[str]) -> str:
    path = kind.__module__.removeprefix("fedraclora.").replace(".", "/") + ".py"
    same = aliases()
    others = [f"`{n}`" + (f" (= `{same[n]}`)" if n in same else "") for n in names[1:]]
    also = f"; also {', '.join(others)}" if others else ""
    text = docstring(kind)
    formulas = [part for part in text.split("\n\n") if part.startswith("    ")]
    up, source = (_bullet(text, name) for name in ("Uplink", "Source"))
    facts = f"[{path}](../{path}){also}. Up: {re.split(r'(?<=[.;]) ', up)[0][:-1]}. {source}"
    return "\n\n".join((f"### {names[0]}", *formulas, facts)) + "\n"


def _bullet(text: str, name: str) -> str:
    """Give what a docstring says under a name, in one line."""
    (found,) = re.findall(rf"^- {name}: (.*?)(?=\n- |\Z)", text, re.DOTALL | re.MULTILINE)
    return " ".join(found.split())
