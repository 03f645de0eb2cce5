"""SIGTERM and Ctrl-C end a command in order: with what it has started, and without its folders."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = 130  # of a command that was interrupted, by the custom of shells


@contextmanager
def in_order() -> Iterator[None]:
    """Let SIGTERM interrupt what is done inside as Ctrl-C does; either ends in a word and a status.

    Raises:
        SystemExit: With `STATUS`, if it was interrupted.
    """

    def interrupt(*_: object) -> None:
        # Where Ray runs, its handler comes first and has set an alarm: in three seconds, abort.
        signal.alarm(0)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:  # its notes say what is left, and how to go on
        print(" ".join(["interrupted", *getattr(error, "__notes__", ())]), file=sys.stderr)
        sys.exit(STATUS)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def at_once() -> Iterator[None]:
    """End the process at the first SIGTERM or Ctrl-C, while libraries are being loaded.

    Nothing has been started yet. An exception would not do: modules that are half loaded turn it
    into errors of their own.
    """

    def leave(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(STATUS)

    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, leave) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
