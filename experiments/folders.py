"""Run folders: where a run writes, when it goes on, and when it refuses to."""

from __future__ import annotations

import fcntl
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import yaml

from fedraclora.checkpoint import difference, replacing
from fedraclora.config import digested
from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.ledger import number, read_ledger
from fedraclora.schema import section

STARTED = datetime.now()  # one stamp for all jobs of a sweep in this process
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
    return ",".join(kept).replace("/", "_") or "run"


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
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path} is damaged: {error}; restore the config file") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} does not hold a config; restore the file from a copy")
    return loaded


def is_finished(folder: Path) -> bool:
    """Tell whether the run of a folder came to its end."""
    return (folder / "summary.json").is_file()


def refuse_existing(folder: Path) -> None:
    """Refuse to write over a run.

    Raises:
        CheckpointError: If a run is there already.
    """
    if (folder / "config.yaml").exists() or (folder / "ledger.jsonl").exists():
        raise CheckpointError(
            f"{folder} holds a run already; choose another output.dir, "
            f"or go on with resume={folder}"
        )


def begin(folder: Path, plain: Plain) -> None:
    """Write the config of a new run into its folder.

    Raises:
        CheckpointError: If a run is there already.
    """
    refuse_existing(folder)
    with replacing(folder / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(plain, sort_keys=False))


def has_checkpoint(folder: Path, every: int) -> bool:
    """Tell whether a run can go on, or was killed so early that it must start again.

    A run that was killed before its first checkpoint is cleared, so that it can.

    Args:
        folder: The run folder.
        every: Rounds between checkpoints.

    Raises:
        CheckpointError: If the ledger shows that there was a checkpoint, and it is gone.
    """
    if (folder / "checkpoint" / "checkpoint.safetensors").is_file():
        return True
    ledger = folder / "ledger.jsonl"
    rows = read_ledger(ledger) if ledger.is_file() else []
    if rows and number(rows[-1], "round") > every:
        raise CheckpointError(
            f"{folder} has no checkpoint, though its ledger reaches round {rows[-1]['round']}; "
            "restore the checkpoint from a copy, or start anew in another folder"
        )
    ledger.unlink(missing_ok=True)
    return False


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


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make and hold a run folder for this process; the lock ends with the process, however it ends.

    Raises:
        CheckpointError: If another process runs in the folder.
        ConfigError: If the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output.dir: cannot make the folder {folder} ({error}); choose another one"
        ) from error
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is running in {folder}; wait for it, or choose another output.dir"
            ) from error
        yield


def write_summary(folder: Path, summary: Mapping[str, object]) -> None:
    """Write summary.json in one move, with versions and revision."""
    found = {**summary, **provenance()}
    with replacing(folder / "summary.json") as partial:
        partial.write_text(json.dumps(found, indent=1, default=str) + "\n")


def provenance() -> Plain:
    """Name the versions and the revision that made a result."""
    packages = ("fedraclora", "flwr", "torch", "numpy", "hydra-core")
    return {"versions": {p: version(p) for p in packages}, "git": git_revision()}


def git_revision() -> str | None:
    """Give the revision of the checkout that runs, with a plus where files differ from it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(here), *words],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip()

    revision = git("rev-parse", "--short=12", "HEAD")
    return f"{revision}{'+' if git('status', '--porcelain', '-uno') else ''}" if revision else None


def method_label(plain: Plain) -> str:
    """Name a run in one or two words."""
    method = section(plain, "method")
    rank = f" r={method['rank']}" if "rank" in method else ""
    return f"{method['name']}{rank}"
