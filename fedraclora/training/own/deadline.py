"""Limit the time of a user's function, even if it catches every exception."""

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
    """Signal that a client is out of time; ``except Exception`` does not catch it."""


def call_within(seconds: float | None, function: Callable[..., T], *given: Any) -> T:
    """Call a function, and interrupt it when its time is over.

    If the function catches the interrupt, it is interrupted again, ever faster. Code in C is
    interrupted when it returns to Python. On the main thread, a sleep is woken, and a loop that
    catches everything ends within seconds. A function that replaces the handler of SIGALRM, or that
    never ends on another thread, continues.

    Args:
        seconds: Time limit; None: no limit.
        function: The function to call.
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
    """Interrupt the thread that created it while that is inside `_called`.

    Cleanup after the function is therefore never interrupted. Intervals are random, so that a loop
    that catches everything is at some time interrupted between two calls.
    """

    def __init__(self, seconds: float) -> None:
        self.over, self.seconds, self.longest = False, seconds, min(CLEANUP, seconds)

    def pause(self) -> float:
        """Return the time until the next interrupt: first time to leave, then ever less.

        The call may itself be interrupted by the next one.
        """
        found = max(SHORTEST, self.longest * DRAWN.random())
        self.longest = max(BURST, self.longest / 2)
        return found

    @staticmethod
    def is_inside(frame: FrameType | None) -> bool:
        """Check whether a thread is inside the function."""
        inner = None
        while frame is not None and frame.f_code is not _called.__code__:
            inner, frame = frame, frame.f_back
        return frame is not None and inner is not None


class _MainThread(_Limit):
    """Interrupt by system alarms, which also wake a sleep."""

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
    """Interrupt from another thread: a sleep or a call into C is interrupted when it returns."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.ident, self.wake = threading.get_ident(), threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:  # an interrupt sent in the last moment may have ended the first wait
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
        """Raise an error in the thread; None cancels an interrupt that has not been raised yet."""
        given = None if error is None else ctypes.py_object(error)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), given)
