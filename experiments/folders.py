"""Run folders: where a run writes, and whether it may go on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import yaml

from fedraclora.checkpoint import difference
from fedraclora.config import digested
from fedraclora.errors import CheckpointError

STARTED = datetime.now()  # one stamp for all jobs of a sweep in this process
LONGEST = 255  # bytes of a name that file systems take
Plain = dict[str, object]


def run_folder(output: Mapping[str, object], sweep_job: str | None) -> Path:
    """Choose the folder of a run.

    Args:
        output: The group ``output`` of the config.
        sweep_job: The overrides of this job of a sweep, or None outside a sweep.

    Returns:
        ``output.dir``, or a dated folder; a job of a sweep has a folder of its own in it.
    """
    named = output.get("dir")
    kind = "runs" if sweep_job is None else "multirun"
    stamp = Path(kind) / f"{STARTED:%Y-%m-%d}" / f"{STARTED:%H-%M-%S}"
    folder = stamp if named is None else Path(str(named)).expanduser()
    return folder if sweep_job is None else folder / sweep_job


def sweep_name(overrides: Sequence[str]) -> str:
    """Name the folder of a sweep's job by what was typed, in the order of the keys.

    Example:
        >>> sweep_name(["seed=1", "output.dir=out", "method=fedavg"])
        'method=fedavg,seed=1'
    """
    kept = sorted(o for o in overrides if not o.startswith(("output.", "resume=", "output=")))
    name = ",".join(kept).replace("/", "_") or "run"
    if len(os.fsencode(name)) <= LONGEST:
        return name
    # What is cut off is in the digest: the same overrides have the same name, others another.
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    room = LONGEST - len(digest) - 1
    return f"{os.fsencode(name)[:room].decode(errors='ignore')}_{digest}"


def read_config(folder: Path) -> Plain:
    """Read the resolved config of a run.

    Raises:
        CheckpointError: If the folder has none.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no run folder: it has no config.yaml")
    try:
        loaded = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes that are no text, too
        raise CheckpointError(f"{path} is damaged: {error}; restore the config file") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} does not hold a config; restore the file from a copy")
    return loaded


def refuse_changes(folder: Path, stored: Plain, plain: Plain, keys: Sequence[str] | None) -> None:
    """Refuse to go on with a run under another config.

    Args:
        folder: The run folder.
        stored: Its config.
        plain: The config that is asked for now.
        keys: The keys that the user typed; None compares every key.

    Raises:
        CheckpointError: Naming each key that differs.
    """
    left, right = digested(stored), digested(plain)
    lines = difference(left, right)
    if keys is not None:
        if "experiment" in keys:
            lines.append("experiment: a preset cannot be laid over a run; leave it out")
        typed = tuple(f"{k}.name:" if isinstance(right.get(k), dict) else f"{k}:" for k in keys)
        lines = [line for line in lines if line.startswith(typed)]
    if lines:
        raise CheckpointError(
            f"{folder} was run under another config; resume changes nothing:\n  "
            + "\n  ".join(lines)
        )
