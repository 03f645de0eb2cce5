"""Write the files of ``conf`` from the signatures: ``make conf``.

A key has one home, the field or argument that reads it; its default and its line of the docstring
are copied from there. Written are:

- a file for each choice that code has by itself, with all its keys;
- in ``config.yaml``, between `BEGIN` and `END`, the keys of no group;
- at the end of a file that says what differs from another choice, all keys, as a comment.

What stands above `BEGIN`, and the presets in ``conf/experiment``, are written by hand.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from fedraclora.compose import CONF
from fedraclora.compose.choices import CHOICE_ROWS, NODES, key_lines, meaning
from fedraclora.config.keys import summary

WRITTEN = "# Written by `make conf` from "
BEGIN = "# ---- written by `make conf`; a default is changed where its key is read ----"
END = "# ---- end of what `make conf` writes ----"
FIRST = ("rounds", "clients", "clients_per_round", "seed")  # what people change first
PRESETS = "experiment"
WIDTH = 100


def choice_texts() -> dict[Path, str]:
    """Return the text of each file that is written as a whole, by path."""
    choices = [(group, name) for group, rows in CHOICE_ROWS.items() for name in rows]
    return {
        CONF / group / f"{name}.yaml": _choice(group, name)
        for group, name in choices
        if f"{group}/{name}" in NODES and not _by_hand(CONF / group / f"{name}.yaml")
    }


def part_texts() -> dict[Path, str]:
    """Return the text of each file of which a part is written, by path.

    The files of `choice_texts` have to be there: a choice is what it builds on.
    """
    found = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        if path.parent.name != PRESETS and _by_hand(path):
            keys = [f"#{line}" for line in key_lines(path.parent.name, path.stem)]
            found[path] = _with_part(path, ["# It sets in all:", *keys])
    run = {key: NODES["run"][key] for key in (*FIRST, *NODES["run"])}
    found[CONF / "config.yaml"] = _with_part(CONF / "config.yaml", [*_lines(run, run)])
    return found


def _by_hand(path: Path) -> bool:
    return path.is_file() and WRITTEN not in path.read_text(encoding="utf-8")


def _choice(group: str, name: str) -> str:
    node, target = NODES[f"{group}/{name}"], CHOICE_ROWS[group][name]
    home = f"{target.__module__}.{target.__qualname__}"
    head = [f"# {summary(target)}", "", f"{WRITTEN}{home}."]
    return "\n".join([*head, *_lines(node, {group: node}, f"{group}.")]) + "\n"


def _with_part(path: Path, lines: list[str]) -> str:
    """Put lines between `BEGIN` and `END` of a file, or at its end."""
    before, _, rest = path.read_text(encoding="utf-8").partition(f"{BEGIN}\n")
    after = rest.partition(f"{END}\n")[2]
    return "\n".join([before.rstrip("\n"), "", BEGIN, *lines, END, after])


def _lines(
    keys: Mapping[str, object], config: Mapping[str, object], above: str = "", indent: str = ""
) -> Iterator[str]:
    """Write keys as YAML, with what each means behind it, or above it where that is long."""
    for key, value in keys.items():
        text = "the choice" if key == "name" and indent == "" else meaning(above + key, config)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, config, f"{above}{key}.", f"{indent}  ")
            continue
        shown = yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n")[0]
        word = f"{indent}{key}: {shown}"
        if len(inline := f"{word:<30}  # {text}") <= WIDTH:
            yield inline if text else word
        else:
            yield from textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ",
                                     subsequent_indent=f"{indent}# ")  # fmt: skip
            yield word


def main() -> None:
    """Write all files, remove those of choices that are gone, and name what changed."""
    whole = choice_texts()
    for path in sorted(CONF.glob("*/*.yaml")):
        if path not in whole and not _by_hand(path):
            path.unlink()
            print(f"removed {path.relative_to(CONF)}")
    _write(whole)
    _write(part_texts())  # which read what has been written


def _write(texts: Mapping[Path, str]) -> None:
    for path, text in texts.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(CONF))


if __name__ == "__main__":
    main()
