"""SIGTERM, SIGHUP and Ctrl-C end a command in order: with all it has started, without its folders.

SIGHUP comes when a terminal closes. Where it is ignored, as ``nohup`` has it, it stays so.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]
ENDS = (signal.SIGTERM, signal.SIGHUP)
STATUS = 130  # of a command that was interrupted, by the custom of shells


@contextmanager
def in_order() -> Iterator[None]:
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
def at_once() -> Iterator[None]:
    """End the process at the first of these signals, while libraries are being loaded.

    Nothing has been started yet. An exception would not do: modules that are half loaded turn it
    into errors of their own.
    """

    def leave(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(STATUS)

    with handled((*ENDS, signal.SIGINT), leave):
        yield
