"""A time limit on a function of the user's that it cannot swallow for long."""

from __future__ import annotations

import ctypes
import random  # noqa: TID251  (when to interrupt; no bit of a run depends on it)
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
CLEANUP = 1.0  # seconds at most that the function has to leave, before it is interrupted again
SHORTEST, BURST = 5e-6, 1e-4  # between two interruptions of one that goes on all the same
DRAWN = random.Random(0)  # noqa: S311


class OutOfTimeError(BaseException):
    """The time of a client is over; a function that catches every Exception does not catch it."""


def call_within(seconds: float | None, function: Callable[..., T], *given: Any) -> T:
    """Call a function, and interrupt it once its time is over.

    It is interrupted again and again, ever faster, if it catches that. What is in C is interrupted
    where it comes back to Python; on the main thread what sleeps is woken, and a loop that catches
    everything is left within seconds. One that takes SIGALRM away, or never ends on another thread,
    goes on.

    Args:
        seconds: That it may take; None: any.
        function: What is called.
        *given: Its arguments.

    Raises:
        OutOfTimeError: If it took longer, whatever it returned or raised.
    """
    if seconds is None:
        return function(*given)
    began, on_main = time.monotonic(), threading.current_thread() is threading.main_thread()
    try:
        with (_MainThread if on_main else _OtherThread)(seconds):
            return _called(function, *given)
    finally:
        if time.monotonic() - began > seconds:
            raise OutOfTimeError


def _called(function: Callable[..., T], *given: Any) -> T:
    return function(*given)


class _Limit:
    """Interrupts the thread that made it, for as long as it is inside of `_called`.

    So nothing is interrupted that puts things back after the function. Intervals are drawn: a loop
    that catches everything is left once it is interrupted between two calls.
    """

    def __init__(self, seconds: float) -> None:
        self.over, self.seconds, self.longest = False, seconds, min(CLEANUP, seconds)

    def pause(self) -> float:
        """Give the time to the next interruption: first to leave, then ever less.

        It may itself be interrupted, by the next one.
        """
        found = max(SHORTEST, self.longest * DRAWN.random())
        self.longest = max(BURST, self.longest / 2)
        return found

    @staticmethod
    def is_inside(frame: FrameType | None) -> bool:
        """Tell whether a thread is in the function, and not where it was called."""
        inner = None
        while frame is not None and frame.f_code is not _called.__code__:
            inner, frame = frame, frame.f_back
        return frame is not None and inner is not None


class _MainThread(_Limit):
    """Interrupts by alarms of the system, which wake what sleeps, too."""

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGALRM, self.interrupt)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: object) -> None:
        self.over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)

    def interrupt(self, _: int, frame: FrameType | None) -> None:
        if self.over or not self.is_inside(frame):
            return
        signal.setitimer(signal.ITIMER_REAL, self.pause())
        raise OutOfTimeError


class _OtherThread(_Limit):
    """Interrupts by a thread of its own: what sleeps or computes in C is so when it is back."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.ident, self.wake = threading.get_ident(), threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:  # what was sent in the last moment may have ended the first
            self.stop()

    def stop(self) -> None:
        self.over = True
        self.wake.set()
        self.thread.join()
        self.send(None)

    def run(self) -> None:
        wait = self.seconds
        while not self.wake.wait(wait):
            if not self.is_inside(sys._current_frames().get(self.ident)):  # noqa: SLF001
                return
            self.send(OutOfTimeError)
            wait = self.pause()

    def send(self, error: type[BaseException] | None) -> None:
        """Have the thread raise an error where it is; None: what it has not raised yet is gone."""
        given = None if error is None else ctypes.py_object(error)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), given)
