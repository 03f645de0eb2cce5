"""Run folders: where a run writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from fedraclora.data.locate import user_path

STARTED = datetime.now()  # one stamp for all jobs of a sweep in this process
LONGEST = 255  # bytes of a name that file systems take


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
    folder = stamp if named is None else user_path("output.dir", named)
    return folder if sweep_job is None else folder / sweep_job


def sweep_name(overrides: Sequence[str]) -> str:
    """Name the folder of a sweep's job by what was typed, in the order of the keys.

    Example:
        >>> sweep_name(["seed=1", "output.dir=out", "method=fedavg"])
        'method=fedavg,seed=1'
    """
    naming = sorted(o for o in overrides if not o.startswith(("output.", "resume=", "output=")))
    name = ",".join(naming).replace("/", "_") or "run"
    if len(os.fsencode(name)) <= LONGEST:
        return name
    # What is cut off is in the digest: the same overrides have the same name, others another.
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    room = LONGEST - len(digest) - 1
    return f"{os.fsencode(name)[:room].decode(errors='ignore')}_{digest}"
