"""Show a run in other libraries while it runs.

A logger is called when a run begins, after each round, and when it ends. ``output.loggers`` chooses
the loggers; their own libraries decide where they write, by environment variables and configuration
files.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol

from typing_extensions import override

from fedraclora.errors import ConfigError, EngineError, unknown
from fedraclora.imports import import_extra
from fedraclora.run.callback import Callback, RunStart
from fedraclora.run.ledger import Row
from fedraclora.weights.files import write_text

# By library; our module for it is imported when a run needs it.
LOGGERS = {
    "tensorboard": "TensorBoardLogger",
    "mlflow": "MLflowLogger",
    "wandb": "WandbLogger",
    "trackio": "TrackioLogger",
}

log = logging.getLogger(__name__)

FILE = "loggers.json"  # file in the run folder: the name of the run in each library
# groups of a row's numbers, as loggers name them
NAMES = {"metrics": "test", "validation": "validation"}


class Logger(Protocol):
    """Show a run in another library."""

    def begin(self, run: RunStart, known: str | None) -> str | None:
        """Open the run; return the name by which the library finds it again, if it has one.

        Args:
            run: The run.
            known: The earlier result of this call, if the run is resumed; None: it begins.
        """

    def row(self, round_: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a round (`scalars`)."""

    def end(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """Close the run.

        Args:
            summary: Its final numbers; empty if it failed.
            failed: Whether it stopped before its end.
        """


@dataclass
class Logging(Callback):
    """Call the loggers of a run.

    A logger that cannot begin stops the run before its first round. One that fails later is dropped
    with a warning, since the ledger has the same numbers.

    Attributes:
        loggers: By their names in the config.
    """

    loggers: dict[str, Logger]
    _going: dict[str, Logger] = field(default_factory=dict)

    @override
    def begin(self, run: RunStart) -> None:
        """Open the run with each logger.

        Raises:
            EngineError: If one fails, naming it.
        """
        known = read_names(run.folder)
        for name, logger in self.loggers.items():
            try:
                found = logger.begin(run, known.get(name))
            except Exception as error:
                self.end({}, failed=True)
                raise EngineError(
                    f"output.loggers: {name} cannot start ({type(error).__name__}: {error}). "
                    "Check its settings, or leave it out."
                ) from error
            self._going[name] = logger
            if found is not None:
                known[name] = found
        if run.folder is not None and known:
            write_text(run.folder / FILE, json.dumps(known) + "\n")

    @override
    def row(self, row: Row) -> None:
        round_ = row["round"]
        if isinstance(round_, int):
            self._each("row", round_, scalars(row))

    @override
    def end(self, summary: Mapping[str, object], *, failed: bool = False) -> None:
        self._each("end", scalars(summary), failed=failed)
        self._going.clear()

    def _each(self, call: str, *arguments: object, **options: object) -> None:
        for name, logger in list(self._going.items()):
            try:
                getattr(logger, call)(*arguments, **options)
            except Exception as error:  # a server or a disk may fail in any way
                del self._going[name]
                log.warning(
                    "%s failed and gets no further rounds (%s: %s); the ledger has all of them",
                    name,
                    type(error).__name__,
                    error,
                )


def read_names(folder: Path | None) -> dict[str, str]:
    """Read the name of a run in each library."""
    path = None if folder is None else folder / FILE
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:  # killed while writing: the libraries start a new run
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def scalars(row: Mapping[str, object], before: str = "") -> dict[str, float]:
    """Return the finite numbers of a row by paths.

    Example:
        >>> scalars({"round": 2, "metrics": {"accuracy": 0.5}, "uplink_total": 7, "notes": []})
        {'test/accuracy': 0.5, 'uplink_total': 7.0}
    """
    found: dict[str, float] = {}
    for key, value in row.items():
        name = NAMES.get(key, key)
        if isinstance(value, Mapping):
            found |= scalars(value, f"{before}{name}/")
        elif is_number(value) and key != "round":
            found[f"{before}{name}"] = float(value)  # type: ignore[arg-type]
    return found


def is_number(value: object) -> bool:
    """Check whether a value is a finite number, and not a truth value."""
    return type(value) in {int, float} and math.isfinite(value)  # type: ignore[arg-type]


def logging_to(names: Sequence[str]) -> Logging:
    """Create the loggers of a run.

    Args:
        names: Keys of `LOGGERS`, each once.

    Raises:
        ConfigError: If one is not known, or its library is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise unknown("output.loggers", name, LOGGERS)
    if len(set(names)) < len(names):
        raise ConfigError(f"output.loggers={list(names)}: name each logger once")
    made: dict[str, Logger] = {}
    for name in names:
        import_extra(name, f"output.loggers={name}")
        made[name] = getattr(import_module(f"{__name__}.{name}"), LOGGERS[name])()
    return Logging(made)
