"""End a failed command with one message and an exit status.

SIGTERM, SIGHUP and Ctrl-C end a command in order: with all it has started, without its folders.
SIGHUP comes when a terminal closes. Where it is ignored, as ``nohup`` has it, it stays so.
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
IN_OWN = re.compile(r"in \w+ of ")  # of the notes that name the hook of a user's object
UNREAD = 141  # of a command whose output is read by `head`, by the custom of shells


def reported(command: Callable[P, int]) -> Callable[P, int]:
    """Wrap a command: print what went wrong, and return the status: 0, its own, or 1."""

    @wraps(command)
    def main(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except Exception as error:  # this is where all of them end
            if isinstance(error, BrokenPipeError) and is_unread():
                raise
            return report_error(error)

    return main


@contextmanager
def printing() -> Iterator[None]:
    """End in silence where nobody reads the output to its end; show names that are no UTF-8.

    Raises:
        SystemExit: With `UNREAD`, if the reader went away.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        sys.exit(UNREAD)


def is_unread() -> bool:
    """Tell whether the reader of the output has gone away."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def report_error(error: Exception) -> int:
    """Print an error, and give the status of a command that ends with it.

    What a user can mend is one message. What nobody foresaw keeps its traceback.
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
    r"""Indent all lines but the first, and write signs that a terminal would obey as they are.

    Example:
        >>> print(in_one_piece("no folder a\nerror: b\x1b[2J"))
        no folder a
          error: b\x1b[2J
    """
    from fedraclora.wire.fields import printable

    first, *others = (printable(line, len(line)) for line in message.split("\n"))
    return "\n".join([first, *(x if x.startswith(" ") else f"  {x}" for x in others)])


def explained(error: Exception) -> str | None:
    """Explain an error in the user's terms, with its notes; None for what nobody foresaw."""
    if (message := _explained(error)) is None:
        return None
    return ". The run stopped ".join([message, *getattr(error, "__notes__", ())])


def _explained(error: Exception) -> str | None:
    if isinstance(error, FedRacLoraError):
        return str(error)
    if any(map(IN_OWN.match, getattr(error, "__notes__", ()))):
        return failure_of(error, "your own code")
    # Before OSError, which Hydra's are in part.
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
    """Convert whatever Hydra raises over the words of a command to an error that says so.

    Raises:
        ConfigError: For an error that is none of Hydra's own.
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
    """What Hydra and OmegaConf refuse; None for other errors."""
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
STATUS = 130  # of a command that was interrupted, by the custom of shells


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let `ENDS` interrupt what is done inside as Ctrl-C does; each ends in a word and a status.

    Raises:
        SystemExit: With `STATUS`, if it was interrupted.
    """

    def interrupt(*_: object) -> None:
        # Where Ray runs, its handler comes first and has set an alarm: in three seconds, abort.
        signal.alarm(0)
        raise KeyboardInterrupt

    try:
        with handled(ENDS, interrupt):
            yield
    except KeyboardInterrupt as error:  # its notes say what is left, and how to go on
        print(" ".join(["interrupted", *getattr(error, "__notes__", ())]), file=sys.stderr)
        sys.exit(STATUS)


@contextmanager
def handled(numbers: Sequence[int], handler: Handler) -> Iterator[None]:
    """Handle signals inside, but a SIGHUP that is ignored."""
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
    """End the process at the first of these signals, while libraries are being loaded.

    Nothing has been started yet. An exception would not do: modules that are half loaded turn it
    into errors of their own.
    """

    def leave(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(STATUS)

    with handled((*ENDS, signal.SIGINT), leave):
        yield
