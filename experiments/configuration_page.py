"""Write the reference of all keys of the config, from the signatures that read them.

``python -m fedraclora.experiments.pages`` puts it into docs/configuration.md. Types and limits are
those that pydantic checks, defaults those of ``conf``, and each meaning is the line of the
docstring that ``--help`` prints.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

from fedraclora.compose import CONF
from fedraclora.compose.choices import (
    CHOICE_ROWS,
    GLOBAL,
    NODES,
    choice,
    groups,
    lineage,
    meaning,
    sections,
)
from fedraclora.config.keys import Target, help_of, node_of, summary, tables_of
from fedraclora.config.run_config import NAMED, SECTIONS, RunConfig
from fedraclora.config.table_rows import BESIDE
from fedraclora.schema import WORDS, Schema, hints, json_schema

# The groups in the order in which a user meets them, with a title in the field's words.
TITLES = {
    "data": "the data set",
    "partition": "how samples are split over clients",
    "model": "the model",
    "method": "what clients train and how the server aggregates it",
    "local": "local training at a client",
    "allocation": "rank allocation over layers",
    "aggregator": "mean or robust aggregation",
    "server_optimizer": "the server's optimizer",
    "privacy": "differential privacy of clients",
    "secure": "secure aggregation",
    "attack": "simulated attacks",
    "system": "simulated devices, stragglers and dropout",
    "engine": "where clients run",
    "pretrain": "training before the first round",
    "output": "files, loggers and checkpoints",
}


CHECKSUM = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{56}\b")  # of a file, which nobody types


class Key(NamedTuple):
    """A key with what a user may know of it.

    Attributes:
        name: With its group: ``local.lr``.
        values: Type and limits, in words.
        text: Its meaning.
    """

    name: str
    values: str
    text: str


def configuration() -> str:
    """Write all sections of the page: keys of no group, sections, and the groups with choices."""
    alone = {key: value for key, value in NODES["run"].items() if key not in SECTIONS}
    parts = ["## Run", _table(_of_target(RunConfig, "", alone))]
    for name, kind in SECTIONS.items():
        node = cast("Mapping[str, object]", NODES["run"][name])
        parts += [f"## {name}", sections()[name], _table(_of_target(kind, f"{name}.", node))]
    for group, title in TITLES.items():
        parts += [f"## {group}", f"`{group}=NAME` chooses {title}.", *_group(group)]
    return "\n\n".join(parts) + "\n"


def _group(group: str) -> Iterable[str]:
    names = groups()[group]
    yield _markdown(
        ("choice", "what it is"), [(f"`{n}`", _cell(text)) for n, text in names.items()]
    )
    found: dict[Key, dict[str, object]] = defaultdict(dict)  # -> choice -> its default
    nested: dict[str, Mapping[str, Target]] = {}
    for name in names:
        values = _values(group, name)
        target = CHOICE_ROWS[group].get(_home(group, name))
        for key, value in values.items():
            whole = f"{group}.{key}"
            text = meaning(whole, {group: {**values, "name": _home(group, name)}})
            if kind := _type_of(group, target, key):
                found[Key(whole, kind, text)][name] = value
        if target is not None:
            for key, (inner, row) in tables_of(target):
                nested.setdefault(f"{group}.{key}", {})[inner] = row  # type: ignore[index]
    if found:
        several = len(names) > 1 and any(len(has) < len(names) for has in found.values())
        head = ("key", "values", "default", *(("choices",) if several else ()), "meaning")
        rows = []
        for each, has in found.items():
            of = (_which([*has], [*names]),) if several else ()
            rows.append((f"`{each.name}`", each.values, _default(has), *of, _cell(each.text)))
        yield _markdown(head, rows)
    yield from _nested(nested)


def _nested(nested: Mapping[str, Mapping[str, Target]]) -> Iterable[str]:
    """Write what keys may be that are groups themselves; equal tables once."""
    same: dict[tuple[str, ...], list[str]] = defaultdict(list)
    tables = {}
    for path, rows in nested.items():
        same[(*rows,)].append(path)
        tables[(*rows,)] = rows
    for names, paths in same.items():
        cells = []
        for name in names:
            keys = node_of(tables[names][name])
            said = [
                f"`{k}={_word(v)}`: {help_of(tables[names][name], k, keys)}"
                for k, v in keys.items()
            ]
            cells.append((f"`{name}`", _cell(summary(tables[names][name])), _cell(" ".join(said))))
        yield f"A group of its own, `KEY.name=NAME`: {', '.join(f'`{path}`' for path in paths)}."
        yield _markdown(("name", "what it is", "keys"), cells)


def _home(group: str, name: str) -> str:
    """Name the choice that code has, on which a choice of a file builds."""
    if group in NAMED:
        return NAMED[group]
    parts = [part.get(group) for part in lineage(f"{group}/{name}")]
    named = [part["name"] for part in parts if isinstance(part, Mapping) and "name" in part]
    return str(named[-1]) if named else name


def _values(group: str, name: str) -> dict[str, object]:
    """Give the keys of a choice with their defaults, those of other groups left out."""
    found = choice(group, name)
    file = CONF / group / f"{name}.yaml"
    if file.is_file() and GLOBAL in file.read_text(encoding="utf-8"):
        own = found.get(group)
        found = {str(k): v for k, v in own.items()} if isinstance(own, Mapping) else {}
    return {key: value for key, value in found.items() if key != "name"}


def _type_of(group: str, target: Target | None, key: str) -> str:
    home, keys = BESIDE.get(group, (None, ()))
    owners = [owner for owner in (target, home if key in keys else None) if owner is not None]
    hint = next((hints(owner)[key] for owner in owners if key in hints(owner)), None)
    return "" if hint is None else _kind(hint)


def _of_target(target: Target, above: str, node: Mapping[str, object]) -> dict[Key, object]:
    return {
        Key(f"{above}{key}", _kind(hints(target)[key]), help_of(target, key, node)): value
        for key, value in node.items()
    }


def _kind(hint: object) -> str:
    """Say the type of a key and its limits."""
    return _said(json_schema(hint))


def _said(schema: Schema) -> str:
    """Say in one cell what values a JSON Schema allows."""
    if "description" in schema:
        return str(schema["description"]).rstrip(",")
    if options := schema.get("anyOf"):
        return " or ".join(dict.fromkeys(map(_said, options)))
    if words := [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])]:
        return ", ".join(f"`{word}`" for word in words)
    kind = str(schema.get("type"))
    if kind == "array":
        return f"list of {_said(schema.get('items', {}))}"
    if kind in {"integer", "number"}:
        return f"{WORDS[kind]}{_bounds(schema)}"
    return (
        "mapping"
        if kind == "object"
        else f"`{kind}`"
        if kind == "null"
        else WORDS.get(kind, str(schema.get("title", "any")))
    )


def _bounds(schema: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    said = [
        f"{sign} {schema[name]:g}"
        for name, sign in signs.items()
        if name in schema and math.isfinite(schema[name])
    ]
    return f" {' and '.join(said)}" if said else ""


def _default(has: Mapping[str, object]) -> str:
    """Write the default that most choices have, and those of the others."""
    words = {name: _word(value) for name, value in has.items()}
    (usual, _), *others = Counter(words.values()).most_common()
    said = [f"`{usual}`"]
    for word, _ in others:
        said.append(f"{_named([n for n, w in words.items() if w == word])}: `{word}`")
    return "; ".join(said)


def _which(has: Sequence[str], names: Sequence[str]) -> str:
    """Name the choices that have a key; where these are most, the ones that lack it."""
    without = [name for name in names if name not in has]
    if not without:
        return "all"
    return f"all but {_named(without)}" if len(without) < len(has) else _named(has)


def _named(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _word(value: object) -> str:
    word = value if isinstance(value, str) else json.dumps(value)
    return "required" if word == "???" else CHECKSUM.sub(r"\1...", word)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _table(keys: Mapping[Key, object]) -> str:
    rows = [(f"`{k.name}`", k.values, f"`{_word(v)}`", _cell(k.text)) for k, v in keys.items()]
    return _markdown(("key", "values", "default", "meaning"), rows)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
