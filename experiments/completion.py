"""Completion by the TAB key: ``eval "$(fedraclora -sc install=bash)"``; zsh and fish likewise.

Hydra knows what may follow in a config. It knows nothing of subcommands, so that they are completed
here, and left out of the line that it is asked about.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence

from fedraclora.experiments.words import NODES

FLAGS = ("-sc", "--shell-completion")
COMPOSED = ("simulate", "flower", "deploy")  # the commands whose words Hydra composes
WHERE = re.compile(rf"\s(?:connection=\S*|{NODES}(?=\s|$))")  # of deploy: no config has them
FOLDER_FLAGS = ("--config-dir", "-cd")


def asked(words: Sequence[str], commands: Collection[str]) -> list[str]:
    """Print what may follow, where that is a subcommand; else give what Hydra is to be asked.

    Args:
        words: ``install=SHELL``, ``uninstall=SHELL``, or ``query=SHELL``, for the line in
            ``COMP_LINE``. That loses its subcommand.
        commands: The subcommands.

    Returns:
        Words for Hydra; none where it has nothing to say.
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
    if typed[0] == "deploy":
        rest = WHERE.sub(" ", rest)
    os.environ["COMP_LINE"] = f"{program} {rest.lstrip()}"
    named = [pair for pair in part_folders(typed)[0] if pair[1]]  # Hydra takes one
    return [*(named[0] if named else ()), FLAGS[0], *words]


def part_folders(words: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Part the flags that name folders of configs, each with its folder, from the other words.

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
