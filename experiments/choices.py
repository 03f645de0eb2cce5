"""The choices of the config groups, read from the folder ``conf``.

A choice says what is its own, and in ``defaults`` on which other files it builds: ``[sgd]`` is a
choice of its group, ``[/lowrank]`` a file beside ``config.yaml``, which is no choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from fedraclora.errors import unknown
from fedraclora.experiments import CONF

# A line of a file: indentation, key, value (in which "#1" is no comment), comment.
LINE = re.compile(r"( *)(\w+):(?: .*?)??(?: +# (.*))?")
GLOBAL = "@package _global_"  # its keys are those of the config itself: clients, data.file


def groups() -> dict[str, dict[str, str]]:
    """List the config groups: group -> choice -> the first comment line of its file."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        found.setdefault(path.parent.name, {})[path.stem] = _comment(path)[0]
    return found


def sections() -> dict[str, str]:
    """List the sections of ``config.yaml`` that are no groups: section -> its comment."""
    comments = _comments(CONF / "config.yaml")
    return {name: comments.get(name, "") for name in _sections()}


def section_keys(name: str) -> str:
    """Write what a section is, and a line for each of its keys, as `keys_of` does of a choice."""
    comments = _comments(CONF / "config.yaml")
    keys = {f"{name}.{key}": value for key, value in _sections()[name].items()}
    return "\n".join([name, *_explained([comments.get(name, "")], keys, comments)])


def _sections() -> dict[str, dict[str, object]]:
    import yaml

    loaded = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    return {k: v for k, v in loaded.items() if isinstance(v, dict) and k != "hydra"}


def choice(group: str, name: str, *, folders: Sequence[Path] = ()) -> dict[str, object]:
    """Read a choice of a group with all that it builds on, as Hydra composes it.

    Args:
        group: For example ``local``.
        name: Of the choice. That it chooses others beside it, as some data do, is left out.
        folders: Where it may be beside ``conf``.

    Returns:
        Its keys; those of the config where the file is for the whole of it. Nothing is resolved.

    Raises:
        ConfigError: If there is no such choice.

    Example:
        >>> momentum = choice("local", "momentum")
        >>> momentum["momentum"], momentum["batch_size"]
        (0.9, 16)
    """
    from omegaconf import OmegaConf

    files = [OmegaConf.load(path) for path in lineage(f"{group}/{name}", [CONF, *folders])]
    merged = OmegaConf.to_container(OmegaConf.merge(*files), resolve=False)
    return {str(k): v for k, v in dict(merged).items() if k != "defaults"}  # type: ignore[arg-type]


def lineage(name: str, roots: Sequence[Path] = (CONF,)) -> list[Path]:
    """List the files that a config is composed of: those that it builds on, then its own.

    Args:
        name: Its path below a root, without the suffix.
        roots: Folders; the first that has a file of the name counts.

    Raises:
        ConfigError: If there is none.
    """
    import yaml

    group, _, last = name.rpartition("/")
    there = [root / f"{name}.yaml" for root in roots if (root / f"{name}.yaml").is_file()]
    if not there:
        known = {path.stem for root in roots for path in (root / group).glob("*.yaml")}
        raise unknown(group, last, known)
    found = []
    loaded = yaml.safe_load(there[0].read_text(encoding="utf-8")) or {}
    for base in loaded.get("defaults", ()):
        if isinstance(base, str) and base != "_self_":  # the others choose in other groups
            above = "" if base.startswith("/") or not group else f"{group}/"
            found += lineage(above + base.lstrip("/"), roots)
    return [*found, there[0]]


def keys_of(group: str, name: str, *, folders: Sequence[Path] = ()) -> str:
    """Write what a choice is, and a line for each of its keys: what it is set to, what it means.

    Args:
        group: For example ``local``.
        name: Of the choice.
        folders: Where it may be beside ``conf``.

    Raises:
        ConfigError: If there is no such choice.
    """
    from omegaconf import OmegaConf

    from fedraclora.weights.files import flatten

    files = lineage(f"{group}/{name}", [CONF, *folders])
    comments: dict[str, str] = {}
    parts = []
    for file in files:  # what is said last holds; each has its own place in the config
        whole = GLOBAL in file.read_text(encoding="utf-8")
        own = OmegaConf.load(file)
        parts.append(own if whole else OmegaConf.create({group: own}))
        before = "" if whole else f"{group}."
        comments |= {before + key: text for key, text in _comments(file).items()}
    merged = OmegaConf.to_container(OmegaConf.merge(*parts), resolve=False)
    found = flatten(merged)  # type: ignore[arg-type]
    keys = {k: v for k, v in found.items() if k not in {"defaults", f"{group}.defaults"}}
    texts = {k: comments.get(k, comments.get(k.removesuffix(".name"), "")) for k in keys}
    return "\n".join([f"{group}={name}", *_explained(_comment(files[-1]), keys, texts)])


def _explained(
    about: Sequence[str], keys: Mapping[str, object], comments: Mapping[str, str]
) -> list[str]:
    """Write what something is, and a line for each of its keys with its value and its comment."""
    rows = [
        (f"{key}={value if isinstance(value, str) else json.dumps(value)}", comments.get(key, ""))
        for key, value in keys.items()
    ]
    width = max((len(word) for word, text in rows if text), default=0)
    lines = [*about, "", *(f"{word:<{width}}  {text}" for word, text in rows)]
    return [f"  {line}".rstrip() for line in lines]


def composed(words: Sequence[str]) -> dict[str, object]:
    """Compose the config as the command line would, as a plain, resolved dict.

    Args:
        words: Hydra's overrides, for example ``["method=fedavg", "seed=1"]``, and
            ``--config-dir DIR``.

    Returns:
        The config.

    Raises:
        ConfigError: If it does not compose.
    """
    from hydra import compose, initialize_config_dir

    from fedraclora.experiments.overrides import in_plain_words, plain_of, searched, without_idle

    words = searched(words)

    def once(words: Sequence[str]) -> dict[str, object]:
        cfg = compose("config", overrides=list(words), return_hydra_config=True)
        return plain_of(cfg, cfg.hydra.runtime.choices)

    with (
        in_plain_words(words),
        initialize_config_dir(version_base="1.3", config_dir=str(CONF)),
    ):
        return without_idle(once(words), words, once)


def _comment(path: Path) -> list[str]:
    """Read the comment that a file begins with, but for what Hydra wants on the first line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = takewhile(lambda text: text.startswith("#"), lines)
    return [text.removeprefix("#").strip() for text in head if "@package" not in text]


def _comments(path: Path) -> dict[str, str]:
    """Read the comments beside the keys of a file, by dotted key."""
    found: dict[str, str] = {}
    within: list[tuple[int, str]] = []  # the keys that the line stands under, with their depth
    for text in path.read_text(encoding="utf-8").splitlines():
        if line := LINE.fullmatch(text):
            depth = len(line[1])
            within = [*(above for above in within if above[0] < depth), (depth, line[2])]
            if line[3]:
                found[".".join(key for _, key in within)] = line[3]
    return found
