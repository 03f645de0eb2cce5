"""Every error this project raises on purpose, under one base.

A message says what came, what was wanted and what to do. `experiments.cli` prints it without
a traceback and exits with status 1, so the words must be enough for the reader.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FedRacLoraError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(FedRacLoraError):
    """The configuration asks for something impossible; the message names the key."""


class ShapeError(FedRacLoraError):
    """Tensors do not fit together; the message gives the shapes."""


class DataError(FedRacLoraError):
    """A data file is missing or is not the file it should be; the message has the command."""


class ModelError(FedRacLoraError):
    """A model has a layer or a target that cannot be trained the way that is asked."""


class WireError(FedRacLoraError):
    """A message does not hold what its header says."""


class CheckpointError(FedRacLoraError):
    """A run folder or a checkpoint is missing, damaged, or belongs to another configuration."""


class EngineError(FedRacLoraError):
    """Where clients run did not start, or broke; the message says why."""


class ClientError(FedRacLoraError):
    """A client failed; the message names the client and the round."""


class RoundLostError(ClientError):
    """A round cannot be run, not a second time either; the message says why."""


class DivergenceError(ClientError):
    """Clients' losses or updates are not finite any more: the run cannot go on as it is."""


# Raised where clients train, these are no client's fault: every client of the run would raise them.
OF_THE_RUN = (ConfigError, ModelError)


def unknown(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """Build the error for a name that is not in a table: all names, and the nearest one.

    Args:
        kind: What the name should be, for example ``"method"``.
        name: What came.
        known: The names that exist.

    Returns:
        The error, to be raised by the caller.

    Example:
        >>> print(unknown("method", "fed_rac_lorra", ["fedavg", "fed_rac_lora"]))
        unknown method 'fed_rac_lorra'; did you mean 'fed_rac_lora'? There are: fed_rac_lora, fedavg
    """
    names = sorted(known)
    near = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ConfigError(f"unknown {kind} {str(name)!r}{hint} There are: {', '.join(names)}")
