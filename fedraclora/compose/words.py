"""Parse arguments of commands that do not use Hydra, and complete arguments for the TAB key.

Install completion with ``eval "$(fedraclora -sc install=bash)"``; zsh and fish likewise. Hydra
completes config keys. It does not know subcommands, which are completed here and removed from the
line that Hydra sees.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence

from fedraclora.errors import ConfigError

TRUTH = {"true": True, "false": False}


def key_values(words: Sequence[str]) -> dict[str, object]:
    """Parse arguments into settings: integers, true and false, and text.

    Raises:
        ConfigError: If an argument is not of the form key=value.

    Example:
        >>> key_values(["seeds=3", "check=true", "out=runs/a"])
        {'seeds': 3, 'check': True, 'out': 'runs/a'}
    """
    group: dict[str, object] = {}
    for word in words:
        key, mark, text = word.partition("=")
        if not mark:
            raise ConfigError(f"{word!r} is not of the form key=value")
        group[key] = int(text) if text.isdecimal() else TRUTH.get(text.lower(), text)
    return group


def part(words: Sequence[str], own: Collection[str]) -> tuple[dict[str, object], list[str]]:
    """Separate a command's own keys, parsed by `key_values`, from the other arguments.

    Example:
        >>> part(["jobs=3", "seed=1"], ["jobs", "out"])
        ({'jobs': 3}, ['seed=1'])
    """
    mine = [word for word in words if word.partition("=")[0] in own]
    return key_values(mine), [word for word in words if word not in mine]


def check_word(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Separate ``--check`` and ``--check=FILE`` from other arguments; None if it is absent.

    Example:
        >>> check_word(["seed=1", "--check"]), check_word(["--check=run.yaml"]), check_word([])
        ((['seed=1'], ''), ([], 'run.yaml'), ([], None))
    """
    mine = [word for word in words if word.partition("=")[0] == "--check"]
    return [w for w in words if w not in mine], mine[-1].partition("=")[2] if mine else None


def trust_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate ``trust=[MODULE,...]``, an argument of every command, from the others.

    Returns:
        The other arguments, and the modules.

    Example:
        >>> trust_words(["seed=1", "trust=[mine, yours.data]"])
        (['seed=1'], ['mine', 'yours.data'])
    """
    mine = [word for word in words if word.startswith("trust=")]
    named = [name.strip(" '\"") for word in mine for name in word[6:].strip("[] ").split(",")]
    return [word for word in words if word not in mine], [name for name in named if name]


FLAGS = ("-sc", "--shell-completion")
COMPOSED = ("simulate", "deploy")  # the commands whose words Hydra composes
# Which no config has: of deploy, and of the page that follows a run.
BESIDE = re.compile(r"\s(?:connection|nodes|deploy\.patched|watch|port)=\S*")
FOLDER_FLAGS = ("--config-dir", "-cd")


def completion_words(words: Sequence[str], commands: Collection[str]) -> list[str]:
    """Complete a subcommand and print it, or return the arguments with which to ask Hydra.

    Args:
        words: ``install=SHELL``, ``uninstall=SHELL``, or ``query=SHELL`` for the line in
            ``COMP_LINE``, from which the subcommand is removed.
        commands: The subcommands.

    Returns:
        Arguments for Hydra; none if Hydra has nothing to complete.
    """
    if not any(word.startswith("query=") for word in words):
        return [FLAGS[0], *words]
    line = os.environ.get("COMP_LINE", "")
    program, *typed = line.split() or [""]
    if not typed or (len(typed) == 1 and not line.endswith(" ")):
        begun = typed[0] if typed else ""
        print(" ".join(name for name in commands if name.startswith(begun)))
        return []
    if typed[0] not in COMPOSED:
        return []
    rest = line.lstrip().removeprefix(program).lstrip().removeprefix(typed[0])
    rest = BESIDE.sub(" ", rest)
    os.environ["COMP_LINE"] = f"{program} {rest.lstrip()}"
    named = [pair for pair in part_folders(typed)[0] if pair[1]]  # Hydra takes one
    return [*(named[0] if named else ()), FLAGS[0], *words]


def part_folders(words: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Separate the flags that name config folders, each with its folder, from other arguments.

    Example:
        >>> part_folders(["seed=1", "--config-dir", "mine", "-cd=yours"])
        ([('--config-dir', 'mine'), ('-cd', 'yours')], ['seed=1'])
    """
    folders, rest = [], []
    left = iter(words)
    for word in left:
        flag, _, folder = word.partition("=")
        if flag in FOLDER_FLAGS:
            folders.append((flag, folder or next(left, "")))
        else:
            rest.append(word)
    return folders, rest
