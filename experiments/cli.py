"""``fedraclora``: one console script, one subcommand per job."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from string import Template

from experiments import completion
from experiments.choices import groups, keys_of
from experiments.interrupt import at_once, in_order
from experiments.status import reported
from fedraclora.errors import unknown

# What each is for stands in usage.tmpl.
COMMANDS: tuple[str, ...] = ("simulate", "flower", "deploy", "node", "compare", "export")
COMMANDS += ("compact", "report", "theory", "init", "bench")
# Commands that are a folder, and the module in it that runs them.
FOLDERS = dict.fromkeys(("bench", "report", "theory"), ".command")


def usage() -> str:
    """Write the help text."""
    chosen = []
    for group, choices in groups().items():
        chosen += [f"  {group}=", *(f"    {name:<22} {text}" for name, text in choices.items())]
    text = Template(Path(__file__).with_name("usage.tmpl").read_text(encoding="utf-8"))
    return text.substitute(groups="\n".join(chosen)).rstrip("\n")


def main(words: Sequence[str] | None = None) -> None:
    """Run a subcommand, and end with its status; `experiments.status` says what went wrong."""
    words = sys.argv[1:] if words is None else list(words)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(usage())
        return
    if {"-h", "--help"} & set(words) and words[0] == "simulate":
        if status := explain(words[1:]):
            sys.exit(status)
        return
    if words[0] == "--version":
        print(f"fedraclora {metadata.version('fedraclora')}")
        return
    if words[0] in completion.FLAGS:
        if asked := completion.asked(words[1:], COMMANDS):
            sys.argv = ["fedraclora", *asked]
            importlib.import_module("experiments.simulate").compose_and_run()
        return
    with in_order():
        status = run(words[0], words[1:])
    sys.exit(status)


@reported
def explain(words: Sequence[str]) -> int:
    """Print the keys of the choices among some words, or the help text if there are none."""
    typed = [word.lstrip("+").partition("=") for word in words]
    chosen = [(group, name) for group, mark, name in typed if mark and group in groups()]
    folders = [Path(name) for _, name in completion.part_folders(words)[0] if name]
    print("\n\n".join(keys_of(*words, folders=folders) for words in chosen) or usage())
    return 0


@reported
def run(command: str, rest: Sequence[str]) -> int:
    """Run a subcommand; give its status."""
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    sys.argv = [f"fedraclora {command}", *rest]
    with at_once():
        module = importlib.import_module(f"experiments.{command}{FOLDERS.get(command, '')}")
    status = module.main()
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    main()
