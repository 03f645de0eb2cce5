"""Why a run stopped before its end, in one file of its folder; gone once it goes on."""

from __future__ import annotations

import json
from pathlib import Path

from fedraclora.errors import CheckpointError, DivergenceError
from fedraclora.weights.files import write_text

FILE = "stopped.json"


def note_stop(folder: Path, done: int, error: BaseException) -> None:
    """Write how a run ended that did not come to its end.

    Args:
        folder: The run folder.
        done: The last round that was closed.
        error: What ended it.
    """
    kind = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    if isinstance(error, DivergenceError):
        kind = "diverged"
    found = {"kind": kind, "round": done, "reason": str(error) or type(error).__name__}
    write_text(folder / FILE, json.dumps(found, indent=1) + "\n")


def forget_stop(folder: Path) -> None:
    """Remove what an earlier attempt left, since the run goes on."""
    (folder / FILE).unlink(missing_ok=True)


def divergence(folder: Path) -> int | None:
    """Read the round in which a stopped run diverged; None if it did not.

    Raises:
        CheckpointError: If the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return int(found["round"]) + 1 if found["kind"] == "diverged" else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!r}); remove it, and the run counts as unfinished"
        ) from error
