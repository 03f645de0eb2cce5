"""Completion by the TAB key: ``eval "$(fedraclora -sc install=bash)"``; zsh and fish likewise.

Hydra knows what may follow in a config. It knows nothing of subcommands, so that they are completed
here, and left out of the line that it is asked about.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence

FLAGS = ("-sc", "--shell-completion")
COMPOSED = ("simulate", "flower", "deploy")  # the commands whose words Hydra composes
FOLDER_FLAGS = ("--config-dir", "-cd")


def complete(words: Sequence[str], commands: Collection[str]) -> None:
    """Do as Hydra's ``--shell-completion`` does.

    Args:
        words: ``install=SHELL``, ``uninstall=SHELL``, or ``query=SHELL``, which prints what may
            stand at the end of the line in ``COMP_LINE``.
        commands: The subcommands.
    """
    folder: list[str] = []
    if any(word.startswith("query=") for word in words):
        line = os.environ.get("COMP_LINE", "")
        program, *typed = line.split() or [""]
        if not typed or (len(typed) == 1 and not line.endswith(" ")):
            begun = typed[0] if typed else ""
            print(" ".join(name for name in commands if name.startswith(begun)))
            return
        if typed[0] not in COMPOSED:
            return
        folder = _folder(typed)
        rest = line.split(maxsplit=1)[1][len(typed[0]) :].lstrip()
        os.environ["COMP_LINE"] = f"{program} {rest}"
    from experiments.simulate import compose_and_run

    sys.argv = ["fedraclora", *folder, FLAGS[0], *words]
    compose_and_run()


def _folder(typed: Sequence[str]) -> list[str]:
    """The flag of a line that names a folder of configs, if there is one."""
    for word, following in zip(typed, [*typed[1:], ""], strict=True):
        flag, mark, folder = word.partition("=")
        if flag in FOLDER_FLAGS and (mark or following):
            return [flag, folder or following]
    return []
