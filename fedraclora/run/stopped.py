"""Record why a run stopped early: one file in its folder, removed when the run is resumed."""

from __future__ import annotations

import json
from pathlib import Path

from fedraclora.errors import CheckpointError, DivergenceError, StoppedError
from fedraclora.weights.files import write_text

STOPPED = "stopped.json"


def note_stop(folder: Path, done: int, error: BaseException, kind: str | None = None) -> None:
    """Write how a run ended that did not come to its end.

    Args:
        folder: The run folder.
        done: The last round that was closed.
        error: What ended it.
        kind: ``interrupted``, ``failed`` or ``diverged``; None if the error says which.
    """
    if kind is None:
        kind = "interrupted" if isinstance(error, KeyboardInterrupt | StoppedError) else "failed"
        kind = "diverged" if isinstance(error, DivergenceError) else kind
    otherwise = "by Ctrl-C or a signal" if kind == "interrupted" else type(error).__name__
    lines = [str(error) or otherwise, *getattr(error, "__notes__", ())]
    found = {"kind": kind, "round": done, "reason": "; ".join(lines)}
    write_text(folder / STOPPED, json.dumps(found, indent=1) + "\n")


def forget_stop(folder: Path) -> None:
    """Remove the stop file of an earlier attempt, since the run is resumed."""
    (folder / STOPPED).unlink(missing_ok=True)


def divergence(folder: Path) -> int | None:
    """Read the round in which a stopped run diverged; None if it did not.

    Raises:
        CheckpointError: If the file is damaged.
    """
    found = _read(folder)
    return found[1] + 1 if found is not None and found[0] == "diverged" else None


def stop_kind(folder: Path) -> str | None:
    """Return how a run stopped early: interrupted, failed or diverged; None if it did not.

    Raises:
        CheckpointError: If the file is damaged.
    """
    found = _read(folder)
    return None if found is None else found[0]


def stop_reason(folder: Path) -> str | None:
    """Return the reason why a run stopped early; None if there is none.

    Raises:
        CheckpointError: If the file is damaged.
    """
    found = _read(folder)
    return None if found is None else found[2]


def _read(folder: Path) -> tuple[str, int, str] | None:
    """Read kind, last round and reason of a stop; None if there was none."""
    path = folder / STOPPED
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["kind"]), int(found["round"]), str(found.get("reason", ""))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!r}). Remove it; the run then counts as unfinished"
        ) from error
