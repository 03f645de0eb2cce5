"""The ``key=value`` words of commands that Hydra does not compose."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedraclora.errors import ConfigError

# Of deploy: local=N is a number of nodes; the config group local has no number for a name.
NODES = r"local=[+-]?[\d.]+"
TRUTH = {"true": True, "false": False}


def key_values(words: Sequence[str]) -> dict[str, object]:
    """Read words into a group of settings: whole numbers, true and false, and text.

    Raises:
        ConfigError: If a word is not of the form key=value.

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
    """Part the words of a command's own keys, read by `key_values`, from the others.

    Example:
        >>> part(["jobs=3", "seed=1"], ["jobs", "out"])
        ({'jobs': 3}, ['seed=1'])
    """
    mine = [word for word in words if word.partition("=")[0] in own]
    return key_values(mine), [word for word in words if word not in mine]


def check_word(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Part ``--check`` and ``--check=FILE`` from other words; None: it is not among them.

    Example:
        >>> check_word(["seed=1", "--check"]), check_word(["--check=run.yaml"]), check_word([])
        ((['seed=1'], ''), ([], 'run.yaml'), ([], None))
    """
    mine = [word for word in words if word.partition("=")[0] == "--check"]
    return [w for w in words if w not in mine], mine[-1].partition("=")[2] if mine else None
