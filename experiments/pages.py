"""Bring tables of results into the pages that show them.

    python -m fedraclora.experiments.pages

A page holds ``<!-- table NAME/table.md -->`` or ``<!-- table NAME/budgets.md: COLUMN, COLUMN -->``,
where NAME is a folder of ``experiments/results``, or, for one column of several studies side by
side, ``<!-- beside FILE: COLUMN: TITLE=NAME, TITLE=NAME -->``. ``<!-- board NAME -->`` is the
leaderboard of a study, with its figure, ``<!-- methods -->`` what the docstrings of the methods
say, with their traits, ``<!-- features -->`` what parts of a run declare that they do not go with,
``<!-- patches -->`` what is changed in Flower, ``<!-- configuration -->`` all keys of the config,
``<!-- bench -->`` all tables of the benchmark,
``<!-- bench WORKLOAD, WORKLOAD -->`` some, and ``<!-- bench WORKLOAD, WORKLOAD: ROW, ROW -->`` some
of their rows side by side. What stands between such a line and the next ``<!-- end -->`` is made
here. A column is named by how its title begins; ± is added where a column ``std`` follows. A test
holds the pages to the results, so no figure is typed twice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from string import Template

import fedraclora.flower.server
import fedraclora.strategies.steps  # noqa: F401  which declare features
from fedraclora.binding import bind
from fedraclora.commands import RESULTS
from fedraclora.commands.cli import USAGE
from fedraclora.commands.study.entries import DEVIATION, docstring
from fedraclora.compatibility import KNOWN, PLACES, Feature
from fedraclora.compose.choices import choice, groups, sections
from fedraclora.config.keys import bullet
from fedraclora.engines.flower_patches import PATCHES
from fedraclora.errors import ConfigError
from fedraclora.experiments.bench.table import side_by_side, tables
from fedraclora.experiments.configuration_page import configuration
from fedraclora.protocol.method import Method
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.shared.factors import Factored
from fedraclora.terminal.tables import Cells, TextTable, read_table

USUAL = Feature.instead  # in the place of a feature
MANY = 10  # keys: those of a group that one of its choices leaves to your code
NAME = "fedraclora."  # of this package; a feature that no class declares is of it
ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    ROOT / "README.md",
    *sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "records").glob("*.md")]),
)
PER_MATRIX = re.compile(" numbers per matrix( and client)?")  # once on the page
TITLE = re.compile(r"\*[^*]+\*, ")  # of a paper, which the docstring has, too
ARXIV = re.compile(r"(?:arXiv )?(\d{4}\.\d{5})")
BLOCK = re.compile(
    r"(?P<head><!-- "
    r"(?P<kind>table|beside|board|methods|features|bench|patches|configuration)"
    r"(?P<words>.*?) -->\n)"
    r"(?P<body>.*?)(?P<end><!-- end -->)",
    re.DOTALL,
)


def filled(text: str, results: Path = RESULTS) -> str:
    """Render every block of a page anew from the results.

    Args:
        text: The page.
        results: The folder of all results.

    Raises:
        ConfigError: A block names a file or a column that is not there, or nothing that is known.
    """
    return BLOCK.sub(lambda found: found["head"] + _made(found, results) + found["end"], text)


def _made(found: re.Match[str], results: Path) -> str:
    head, *rest = [part.strip() for part in found["words"].split(": ")]
    derived = {
        "methods": methods,
        "features": features,
        "patches": patches,
        "configuration": configuration,
    }
    if found["kind"] in derived:
        return derived[found["kind"]]()
    if found["kind"] == "board":
        return board(head, results)
    if found["kind"] == "bench":
        folder = results / "bench"
        if rest:
            return side_by_side(folder, _words(head), _words(rest[0]))
        return tables(folder, _words(head)) if head else tables(folder)
    texts = 1
    if found["kind"] == "table":
        cells = read_table(results / head)
        if rest:
            cells = [_chosen(row, _words(rest[0])) for row in cells]
        else:
            texts = texts_of(results / head)
    elif len(rest) == 2:
        cells = _beside(head, rest[0], _words(rest[1]), results)
    else:
        form = "<!-- beside FILE: COLUMN: TITLE=NAME, TITLE=NAME -->"
        raise ConfigError(f"{found['head'].strip()} does not say what to show; wanted: {form}")
    return replace(TextTable.of(cells), texts=texts).markdown()


def texts_of(path: Path) -> int:
    """Count the first columns of a Markdown file's table that are not aligned as numbers."""
    _, line, *_ = [line for line in path.read_text("utf-8").splitlines() if line.startswith("|")]
    return len([*takewhile(lambda cell: not cell.strip().endswith(":"), line.split("|")[1:-1])])


def _beside(file: str, column: str, names: list[str], results: Path) -> Cells:
    """One column of several studies: a row per method, in the order in which methods appear."""
    studies = {}
    for name in names:
        title, _, folder = name.partition("=")
        rows = read_table(results / (folder or title) / file)
        studies[title] = {row["method"]: [*_chosen(row, [column]).values()][-1] for row in rows}
    methods = dict.fromkeys(method for values in studies.values() for method in values)
    return [
        {"method": method} | {title: values.get(method, "") for title, values in studies.items()}
        for method in methods
    ]


def _chosen(row: Mapping[str, str], columns: list[str]) -> dict[str, str]:
    """The method and some columns; a mean takes its spread along, where that is a column."""
    titles = list(row)
    shown = {titles[0]: row[titles[0]]}
    for column in columns:
        title = _title(row, column)
        after = titles[titles.index(title) + 1 :][:1]
        spread = f" ± {row['std']}" if after == ["std"] and row["std"] not in {"nan", "-"} else ""
        shown[f"{title}, {DEVIATION}" if after == ["std"] else title] = row[title] + spread
    return shown


def _title(row: Mapping[str, str], column: str) -> str:
    for title in row:
        if title.startswith(column):
            return title
    raise ConfigError(f"no column begins with {column!r}; there are {', '.join(row)}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def features() -> str:
    """Write a section for each feature that excludes or needs others, and a table of keys."""
    # Of this project: a program may have declared features of its own.
    known = {n: f for n, f in sorted(KNOWN.items()) if PLACES.get(n, NAME).startswith(NAME)}
    sections = [
        f"### {name}\n\n{_excluded(feature)}"
        for name, feature in known.items()
        if feature.avoids or feature.requires
    ]
    reads = [
        (", ".join(f"`{key}`" for key in feature.reads), feature.take or name)
        for name, feature in known.items()
        if feature.reads and len(feature.reads) < MANY
    ]
    keys = TextTable(("key", "has an effect with"), tuple(sorted(reads)), (), texts=2)
    return "\n".join([*sections, f"### Keys that need another setting\n\n{keys.markdown()}"])


def _excluded(feature: Feature) -> str:
    """Write what to use in its place, and the table of what it excludes: a row for each reason."""
    rows: dict[str, list[str]] = {}
    for beside, why in feature.avoids.items():
        rows.setdefault(why, []).append(_or(beside, KNOWN[beside].instead))
    for beside, why in feature.requires.items():
        needed = _or(f"a run without {beside}", KNOWN[beside].take or beside)
        rows.setdefault(why, []).append(needed)
    pairs = tuple(("<br>".join(names), why) for why, names in rows.items())
    table = TextTable(("does not go with", "because"), pairs, (), texts=2).markdown()
    return table if feature.instead == USUAL else f"In its place: {feature.instead}.\n\n{table}"


def _or(name: str, instead: str) -> str:
    """Name a feature, with what to use in its place."""
    return name if instead == USUAL else f"{name} (use {instead})"


def board(name: str, results: Path) -> str:
    """Render the leaderboard of a study with its figure, or say that it has not run.

    It is for a page in docs/records.

    Args:
        name: Of the study.
        results: The folder of all results.
    """
    folder = results / name
    command = f"`fedraclora compare study={name} out=experiments/results/{name}`"
    if not (folder / "leaderboard.md").is_file():
        return f"Not run yet: {command}.\n"
    text = (folder / "leaderboard.md").read_text(encoding="utf-8")
    picture = f"![leaderboard](../../experiments/results/{name}/leaderboard.png)"
    return f"{text}\nBy {command}.\n\n{picture}\n"


def patches() -> str:
    """Write the table of what is changed in Flower."""
    rows = [f"| `{each.name}` | {each.buys} |\n" for each in PATCHES]
    return "".join(["| patch | what it buys |\n|---|---|\n", *rows])


def methods() -> str:
    """Render a table of all methods, and of each file its formulas, uplink and source."""
    kinds: dict[type[Method], list[str]] = {}
    for name, kind in METHODS.items():
        kinds.setdefault(kind, []).append(name)
    return "\n".join([_overview().markdown(), *(_section(*each) for each in kinds.items())])


def method_of(name: str) -> Method:
    """Make a method as ``method=name`` has it."""
    return bind("method", METHODS, choice("method", name))()


@cache
def aliases() -> Mapping[str, str]:
    """List the names that stand for the settings of another name: name -> the other."""
    first: dict[Method, str] = {}
    found = {name: first.setdefault(method_of(name), name) for name in METHODS}
    return {name: other for name, other in found.items() if name != other}


def _overview() -> TextTable:
    lines = groups()["method"]
    rows = []
    for name, kind in METHODS.items():
        method = method_of(name)
        flags = {
            "exact": method.traits.exact,
            "linear": method.traits.linear,
            "ranks": method.traits.ranks,
            "state": method.client_state,
            "merges": method.traits.merges,
            "both": isinstance(method, Factored) and method.never_restarts,
        }
        title, _, what = lines[name].partition(": ")
        has = ", ".join(flag for flag, is_so in flags.items() if is_so)
        rows.append((f"`{name}`", (what or title).rstrip("."), has, held_to(kind)))
    return TextTable(("`method=`", "what it does", "traits", "held to"), tuple(rows), (), texts=4)


def held_to(kind: type[Method]) -> str:
    """Return what an implementation was compared with: code, a number of the paper, or neither."""
    said = bullet(docstring(kind), "Held to")
    found = [word for word, mark in (("code", " at "), ("number", "the paper's")) if mark in said]
    return ", ".join(found) or "oracle"


def _section(kind: type[Method], names: list[str]) -> str:
    path = kind.__module__.removeprefix("fedraclora.").replace(".", "/") + ".py"
    same = aliases()
    others = [f"`{n}`" + (f" (= `{same[n]}`)" if n in same else "") for n in names[1:]]
    also = f" Also {', '.join(others)}." if others else ""
    text = docstring(kind)
    parts = text.replace("sum_k p_k", "mean_k").split("\n\n")
    formulas = [part.replace("``", "") for part in parts if part.startswith("    ")]
    up, source = (bullet(text, name) for name in ("Uplink", "Source"))
    up = PER_MATRIX.sub("", re.split(r"(?<=[.;]) ", up)[0][:-1])
    source = ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", TITLE.sub("", source))
    facts = f"Up: {up}.{also} {source}"
    return "\n\n".join((f"### [{names[0]}](../{path})", *formulas, facts)) + "\n"


def usage() -> str:
    """Render what ``fedraclora --help`` prints."""
    chosen = []
    for group, choices in groups().items():
        chosen += [f"  {group}=", *(f"    {name:<22} {text}" for name, text in choices.items())]
    kept = [f"  {name:<24} {text}" for name, text in sections().items()]
    text = Template(USAGE.with_suffix(".tmpl").read_text(encoding="utf-8"))
    return text.substitute(groups="\n".join(chosen), sections="\n".join(kept)).rstrip("\n") + "\n"


def main() -> None:
    """Update all pages, and name those that changed."""
    USAGE.write_text(usage(), encoding="utf-8")
    for page in PAGES:
        text = page.read_text()
        try:
            made = filled(text)
        except ConfigError as error:
            sys.exit(f"error: {page.relative_to(ROOT)}: {error}")
        if made != text:
            page.write_text(made)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
