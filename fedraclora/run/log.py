"""Write the log of a run: details that the terminal does not show, in a file of its folder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedraclora.weights.files import keep_private

LOG = "run.log"
PROJECT = logging.getLogger("fedraclora")
log = logging.getLogger(__name__)

# What an operator has to know at once. A search for a learning rate hides warnings, and not this.
NOTICE = logging.WARNING + 1
logging.addLevelName(NOTICE, "NOTICE")

# Libraries that tell programmers what will change in them. A user of a run can do nothing about it.
LIBRARIES = ("accelerate", "huggingface_hub", "peft", "ray", "torch", "transformers")
ANNOUNCED = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)


@contextmanager
def logged(folder: Path | None) -> Iterator[None]:
    """Append to the log of a run what is logged inside, and what `quiet_libraries` hides.

    Args:
        folder: Of the run; None where it is in memory, and has no log.
    """
    if folder is None:
        with quiet_libraries():
            yield
        return
    path, level = folder / LOG, PROJECT.level
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    keep_private(path)
    root = logging.getLogger()
    root.addHandler(handler)
    PROJECT.setLevel(min(PROJECT.getEffectiveLevel(), logging.INFO))
    try:
        with quiet_libraries():
            yield
    finally:
        PROJECT.setLevel(level)
        root.removeHandler(handler)
        handler.close()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Log what libraries announce of their future, in place of showing it; all else is shown."""
    before = warnings.showwarning

    def show(
        message: Any, category: Any, filename: str, lineno: int, *rest: Any, **more: Any
    ) -> None:
        if issubclass(category, ANNOUNCED) and {*Path(filename).parts} & {*LIBRARIES}:
            log.info("%s:%d: %s: %s", filename, lineno, category.__name__, message)
        else:
            before(message, category, filename, lineno, *rest, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
