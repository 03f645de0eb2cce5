"""Functions of other people's packages, named in a config as ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from fedraclora.errors import ConfigError


def import_function(key: str, name: str) -> Any:
    """Import what a config names.

    Args:
        key: Of the config, for messages.
        name: ``package.module:function``; the package is installed wherever it is asked for.

    Raises:
        ConfigError: If it is not of that form, cannot be imported, or cannot be called.

    Example:
        >>> import_function("data.loss", "math:sqrt")(4.0)
        2.0
    """
    module, mark, attribute = name.partition(":")
    if not (module and mark and attribute):
        raise ConfigError(f"{key} is {name!r}; package.module:function is wanted")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module of somebody else's does when it is imported
        raise ConfigError(
            f"{key} is {name!r}, which cannot be imported here ({error}): the package must be "
            "installed on this machine, for the Python that runs this"
        ) from error
    if not callable(found):
        raise ConfigError(f"{key} is {name!r}, which is a {type(found).__name__}, no function")
    return found


def check_call(key: str, function: Callable[..., object], **arguments: object) -> None:
    """Refuse a function that does not take these arguments, before it is called.

    Args:
        key: Of the config that names it, for messages.
        function: What `import_function` gave.
        **arguments: With which it is going to be called.

    Raises:
        ConfigError: Naming the arguments that are handed over, and those that it takes.
    """
    try:
        wanted = inspect.signature(function)
    except ValueError:  # of some functions of C nobody knows
        return
    try:
        wanted.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"{key}: the function is called with {', '.join(arguments)} by name, and takes "
            f"{wanted} ({error})"
        ) from error
