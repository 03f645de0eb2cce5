"""Loggers: where a run is shown while it goes, by the libraries' own clients.

A logger is told of a run three times: when it begins, after each round, and when it ends. Which of
them a run has says ``output.loggers``; where each writes says its own library, by environment
variables and files of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from fedraclora.errors import ConfigError, unknown
from fedraclora.loggers.base import Logger, Logging, scalars

__all__ = ["LOGGERS", "Logger", "Logging", "logging_to", "scalars"]

# By the library, whose module here is imported where a run asks for it.
LOGGERS = {
    "tensorboard": "TensorBoardLogger",
    "mlflow": "MLflowLogger",
    "wandb": "WandbLogger",
    "trackio": "TrackioLogger",
}


def logging_to(names: Sequence[str]) -> Logging:
    """Make the loggers of a run.

    Args:
        names: Keys of `LOGGERS`, each once.

    Raises:
        ConfigError: If one is not known, or its library is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise unknown("output.loggers", name, LOGGERS)
    if len(set(names)) < len(names):
        raise ConfigError(f"output.loggers is {list(names)}; each logger is wanted once")
    made: dict[str, Logger] = {}
    for name in names:
        try:
            made[name] = getattr(import_module(f"{__name__}.{name}"), LOGGERS[name])()
        except ImportError as error:
            raise ConfigError(
                f"output.loggers names {name}, but its library is not installed ({error}): "
                f"pip install {name}"
            ) from error
    return Logging(made)
