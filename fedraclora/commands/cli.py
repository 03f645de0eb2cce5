"""The console script ``fedraclora`` and its subcommands."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from types import ModuleType

from fedraclora.commands import require_laboratory
from fedraclora.commands.status import ending_on_signals, exiting_on_signals, printing, reported
from fedraclora.commands.watch import WATCHED, watch_options
from fedraclora.compose import words as typed
from fedraclora.errors import unknown
from fedraclora.trust import restricted_imports, trusting

# Written by `experiments.pages`, so that the help text does not wait for imports.
USAGE = Path(__file__).with_name("usage.txt")
# usage.tmpl describes each of them.
COMMANDS: tuple[str, ...] = ("simulate", "deploy", "node", "federation", "compare", "evaluate")
COMMANDS += ("predict", "export")
COMMANDS += ("compact", "report", "watch", "study", "tune", "theory", "init", "bench")
HELP = {"-h", "--help"}
VERBOSE = {"-v", "--verbose"}
# Their help is their module's docstring.
BY_DOCSTRING = ("compare", "deploy", "federation", "theory", "bench")
# Modules of the commands that are not `fedraclora.commands.<name>`.
HOMES = {name: f"fedraclora.experiments.{name}.command" for name in ("bench", "theory")}
HOMES |= {"study": "fedraclora.commands.study.run", "report": "fedraclora.commands.report.page"}
HOMES |= {"watch": "fedraclora.commands.watch.command"}
HOMES["compare"] = "fedraclora.commands.compare.command"
HOMES["init"] = "fedraclora.commands.init.command"


@printing()
def main(words: Sequence[str] | None = None) -> None:
    """Run a subcommand, and exit with its status."""
    words = sys.argv[1:] if words is None else list(words)
    if not words or words[0] in {*HELP, "help"}:
        print(USAGE.read_text(encoding="utf-8"), end="")
        return
    if HELP & {*words} and words[0] == "simulate":
        if status := explain(words[1:]):
            sys.exit(status)
        return
    if words[0] == "--version":
        print(f"fedraclora {metadata.version('fedraclora')}")
        return
    if words[0] in typed.FLAGS:
        if asked := typed.completion_words(words[1:], COMMANDS):
            with hydra_arguments(["fedraclora", *asked]), restricted_imports(()):
                importlib.import_module("fedraclora.commands.simulate").compose_and_run()
        return
    with ending_on_signals():
        status = run(words[0], words[1:])
    sys.exit(status)


@contextmanager
def hydra_arguments(words: Sequence[str]) -> Iterator[None]:
    """Put words where Hydra reads the command line; afterwards it is as before."""
    before, sys.argv = sys.argv, [*words]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def of_the_user(words: Sequence[str]) -> Iterator[list[str]]:
    """Trust the modules of ``trust=`` inside, and allow imports of those and of named ones."""
    rest, modules = typed.trust_words(words)
    with restricted_imports(rest), trusting(modules):
        yield rest


@reported
def explain(words: Sequence[str]) -> int:
    """Print the keys of the groups and sections among the arguments, else the help text."""
    with of_the_user(words) as rest:
        return _explain(rest)


def _explain(words: Sequence[str]) -> int:
    from fedraclora.compose.choices import groups, keys_of, section_keys, sections

    folders = [Path(name) for _, name in typed.part_folders(words)[0] if name]
    found: dict[str, None] = {}  # each once, in their order
    for word in words:
        key, mark, name = word.lstrip("+").partition("=")
        if mark and key in groups():
            found[keys_of(key, name, folders=folders)] = None
        elif (section := key.partition(".")[0]) in sections():
            found[section_keys(section)] = None
    print("\n\n".join(found) or USAGE.read_text(encoding="utf-8").rstrip("\n"))
    return 0


@reported
def run(command: str, words: Sequence[str]) -> int:
    """Run a subcommand; return its exit status."""
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    with of_the_user(words) as rest:
        return _run(command, rest)


def spelled_out(words: Sequence[str]) -> list[str]:
    """Replace flags by the keys that they stand for."""
    return ["output.verbose=true" if word in VERBOSE else word for word in words]


def imported(home: str) -> ModuleType:
    """Import the module of a command; what that creates is never searched for garbage.

    It stays until the process ends. To search it again and again takes 0.5 s of a short run.
    """
    if home in sys.modules or not gc.isenabled():
        return importlib.import_module(home)
    gc.disable()
    try:
        return importlib.import_module(home)
    finally:
        gc.freeze()
        gc.enable()


def _run(command: str, words: Sequence[str]) -> int:
    if command in typed.COMPOSED:
        words = spelled_out(words)
    home = HOMES.get(command, f"fedraclora.commands.{command}")
    if home.startswith("fedraclora.experiments."):
        require_laboratory(f"fedraclora {command}")
    watched = watch_options(words) if command in WATCHED else nullcontext(words)
    with hydra_arguments([f"fedraclora {command}", *words]), watched as rest:
        with exiting_on_signals():
            module = imported(home)
        if HELP & {*words} and command in BY_DOCSTRING:
            print(module.__doc__)
            return 0
        return int(module.main(rest) or 0)


if __name__ == "__main__":
    main()
