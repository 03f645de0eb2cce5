"""Turn errors and signals of a command into one message and an exit status.

SIGTERM, SIGHUP and Ctrl-C end a command cleanly: it stops its processes and removes its temporary
folders. A terminal sends SIGHUP when it closes. A SIGHUP that is ignored (``nohup``) stays ignored.
"""

from __future__ import annotations

import io
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import ParamSpec

from fedraclora.errors import ConfigError, FedRacLoraError, of_system
from fedraclora.imports import failure_of

P = ParamSpec("P")
IN_OWN = re.compile(r"in \w+ of ")  # in notes that name a hook of a user's object
UNREAD = 141  # a shell's status of a command that SIGPIPE ended, as before `| head`


def reported(command: Callable[P, int]) -> Callable[P, int]:
    """Wrap a command: print its errors, and return its exit status, 1 after an error."""

    @wraps(command)
    def main(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except Exception as error:  # every error of a command ends here
            if isinstance(error, BrokenPipeError) and is_unread():
                raise
            return report_error(error)

    return main


@contextmanager
def printing() -> Iterator[None]:
    """Handle a closed pipe at the output, and escape names that are not UTF-8.

    Raises:
        SystemExit: With `UNREAD`, if the reader closed the pipe (``| head``).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        sys.exit(UNREAD)


def is_unread() -> bool:
    """Check whether the reader of the output has closed the pipe."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def report_error(error: Exception) -> int:
    """Print an error, and return the exit status 1.

    An error that the user can correct is one message. An unexpected error keeps its traceback.
    """
    message = explained(error)
    if message is None:
        traceback.print_exception(error)
        message = (
            f"this is a bug of fedraclora, not your mistake ({type(error).__name__}). Please "
            "report it with the traceback above and the command"
        )
    print(f"error: {in_one_piece(message)}", file=sys.stderr)
    return 1


def in_one_piece(message: str) -> str:
    r"""Indent all lines of a message but the first, and escape control characters.

    Example:
        >>> print(in_one_piece("no folder a\nerror: b\x1b[2J"))
        no folder a
          error: b\x1b[2J
    """
    from fedraclora.wire.fields import printable

    first, *others = (printable(line, len(line)) for line in message.split("\n"))
    return "\n".join([first, *(x if x.startswith(" ") else f"  {x}" for x in others)])


def explained(error: Exception) -> str | None:
    """Explain an error in the user's terms, with its notes; None for an unexpected error."""
    if (message := _explained(error)) is None:
        return None
    return ". The run stopped ".join([message, *getattr(error, "__notes__", ())])


def _explained(error: Exception) -> str | None:
    if isinstance(error, FedRacLoraError):
        return str(error)
    if any(map(IN_OWN.match, getattr(error, "__notes__", ()))):
        return failure_of(error, "your own code")
    # Some errors of Hydra are OSErrors, too.
    if (message := _of_config(error)) is not None:
        return message
    if isinstance(error, OSError):
        return of_system(error)
    from fedraclora.training.memory import is_out_of_memory

    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return (
            f"memory ran out ({str(error) or type(error).__name__}): use a smaller model, "
            "local.batch_size, evaluate.batch_size or clients_per_round"
        )
    return None


@contextmanager
def composing() -> Iterator[None]:
    """Convert an unexpected error of Hydra about a command's arguments.

    Raises:
        ConfigError: In place of any error that `explained` does not know.
    """
    try:
        yield
    except Exception as error:
        if explained(error) is not None:
            raise
        raise ConfigError(
            f"Hydra cannot read these arguments: {error}. Write each as key=value, group=choice, "
            "+key=value or ~key"
        ) from error


def _of_config(error: Exception) -> str | None:
    """Explain an error of Hydra or OmegaConf; None for other errors."""
    from hydra.errors import HydraException
    from omegaconf.errors import (
        InterpolationKeyError,
        InterpolationResolutionError,
        MissingMandatoryValue,
        OmegaConfBaseException,
    )

    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    text = " ".join(str(error).partition("\n    full_key:")[0].split())
    key = getattr(error, "full_key", None) or "the config"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}=??? marks a value that you must give: set {key}=VALUE"
    if isinstance(error, InterpolationKeyError):
        return (
            f"{key} takes its value from another key, which this config does not have ({text}). "
            f"Set {key} itself, or choose an option with that key"
        )
    if isinstance(error, InterpolationResolutionError):
        return f"{key} takes its value from a source that has none ({text}): set {key} itself"
    if key != "the config" and key not in text:
        text = f"{key}: {text}"
    return text


Handler = Callable[[int, FrameType | None], object]
ENDS = (signal.SIGTERM, signal.SIGHUP)
STATUS = 130  # a shell's status of an interrupted command


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Treat `ENDS` like Ctrl-C inside, and exit with a message after any of them.

    Raises:
        SystemExit: With `STATUS`, after an interrupt.
    """

    def interrupt(*_: object) -> None:
        # Ray's own handler runs first, and has set an alarm that aborts in three seconds.
        signal.alarm(0)
        raise KeyboardInterrupt

    try:
        with handled(ENDS, interrupt):
            yield
    except KeyboardInterrupt as error:  # its notes say what was kept, and how to resume
        print(" ".join(["interrupted", *getattr(error, "__notes__", ())]), file=sys.stderr)
        sys.exit(STATUS)


@contextmanager
def handled(numbers: Sequence[int], handler: Handler) -> Iterator[None]:
    """Handle signals inside, except a SIGHUP that is ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    taken = [n for n in numbers if n != signal.SIGHUP or not ignored]
    before = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def exiting_on_signals() -> Iterator[None]:
    """Exit at once on a signal while libraries are imported.

    Nothing needs a cleanup yet, and an exception would not work: a partly imported module turns it
    into another error.
    """

    def exit_now(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(STATUS)

    with handled((*ENDS, signal.SIGINT), exit_now):
        yield
