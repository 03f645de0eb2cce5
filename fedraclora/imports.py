"""Import user code that a config names as ``package.module:function``.

The module is on Python's path or in the working folder, and is the user's own or trusted
(`fedraclora.trust`).
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fedraclora.errors import ConfigError, FedRacLoraError
from fedraclora.trust import MODULE, refuse_found, refuse_place

_BRINGS_IN: ContextVar[str | None] = ContextVar("_BRINGS_IN", default=None)
GUARD = 'if __name__ == "__main__":'
# Packages that an installation may lack, and the extra of pyproject.toml that has each.
EXTRAS = {
    "dp_accounting": "privacy",
    "gguf": "export",
    "mlflow": "loggers",
    "optuna": "tune",
    "peft": "export",
    "plotly": "report",
    "tensorboard": "loggers",
    "trackio": "loggers",
    "wandb": "loggers",
}


@contextmanager
def importing(what: str) -> Iterator[None]:
    """Forbid starting a run while user modules are being imported (`refuse_run`).

    If a script starts a run and its config names the script, the run and each of its workers import
    it: each import would start another run, and wait for workers without end.

    Args:
        what: The importer, for the message.
    """
    token = _BRINGS_IN.set(what)
    try:
        yield
    finally:
        _BRINGS_IN.reset(token)


def refuse_run() -> None:
    """Reject a run that a module starts while another run imports it.

    Raises:
        ConfigError: If a run starts inside `importing`.
    """
    if (what := _BRINGS_IN.get()) is not None:
        raise ConfigError(
            f"{what} imports the module that starts this run, and another run would start in it: "
            f"put the call of fedraclora.simulate below `{GUARD}`"
        )


def import_object(key: str, name: str) -> Any:
    """Import the object that a config names.

    Args:
        key: The key of the config, for messages.
        name: ``package.module:function``.

    Raises:
        ConfigError: If it is not of that form, cannot be imported, or is not trusted, in which
            case nothing was imported.

    Example:
        >>> import_object("data.loss", "torch.nn:L1Loss").__name__
        'L1Loss'
    """
    module, mark, attribute = name.partition(":")
    if not (module and mark and attribute and MODULE.fullmatch(name)):
        raise ConfigError(f"{key}={name!r}: give package.module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that a file here does not hide a package
    try:
        refuse_place(key, name)
        with importing(f"{key}={name}"):
            imported = importlib.import_module(module)
    except FedRacLoraError:
        raise
    except ImportError as error:
        raise ConfigError(
            f"{key}={name!r} cannot be imported ({error}). Put the module into the working "
            f"folder ({here}) or on PYTHONPATH, or install it for this Python."
        ) from error
    except Exception as error:
        raise ConfigError(f"{key}={name!r}: {failure_of(error, 'importing it')}") from error
    found = getattr(imported, attribute, None)
    if found is None:
        origin = getattr(imported, "__file__", None) or "built into Python"
        advice = ": __main__ is another program in each process; name the file instead"
        raise ConfigError(
            f"{key}={name!r} cannot be imported: the module {module} ({origin}) has no "
            f"{attribute}{advice * (module == '__main__')}"
        )
    refuse_found(key, name, found)
    return found


def import_extra(module: str, purpose: str) -> Any:
    """Import a module of a package that an installation may lack (`EXTRAS`).

    Args:
        module: Its import name.
        purpose: The feature that needs it, for the message.

    Raises:
        ConfigError: Saying which extra has the package, and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}). Install "
            f"it in your checkout of fedraclora: pip install -e '.[{EXTRAS[package]}]'"
        ) from error


def check_call(key: str, function: Callable[..., object], *given: str, **named: object) -> None:
    """Reject a function that does not accept these arguments, before it is called.

    Args:
        key: The key that names it, for messages.
        function: The function.
        *given: Descriptions of its positional arguments.
        **named: Descriptions of its keyword arguments.

    Raises:
        ConfigError: Naming the arguments that it will receive, and those that it accepts.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions in C have no signature
        return
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        words = ", ".join([*given, *([f"{', '.join(named)} by name"] if named else [])])
        raise ConfigError(
            f"{key}: the function is called with {words}, and takes {signature} ({error})"
        ) from error


@contextmanager
def as_user_error(
    kind: type[FedRacLoraError],
    before: str,
    what: str,
    after: str = "",
    passing: tuple[type[Exception], ...] = (FedRacLoraError,),
) -> Iterator[None]:
    """Turn an exception of user code into an error of this project.

    Args:
        kind: The error to raise.
        before: Start of its text.
        what: A description of the code inside, for `failure_of`.
        after: End of its text.
        passing: Exceptions that are not changed.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        raise kind(f"{before}{failure_of(error, what)}{after}") from error


def failure_of(error: BaseException, what: str) -> str:
    """Describe an exception and its line: the last one outside of libraries."""
    if isinstance(error, SyntaxError):
        return f"{what} raises SyntaxError: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).parent)
    own = [f for f in frames if "site-packages" not in f.filename and here not in f.filename]
    last = (own or frames)[-1]
    place = f"{Path(last.filename).name}, line {last.lineno}"
    return f"{what} raises {type(error).__name__}: {error} ({place})"
