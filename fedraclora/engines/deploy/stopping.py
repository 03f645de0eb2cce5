"""Let a signal that stops a run wait until the run can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from fedraclora.errors import StoppedError

# Flower sends itself SIGINT when a run was stopped; the others come from whoever ends the program.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Raise an error for a signal, but only where a run waits for clients.

    Elsewhere a round is being closed: a checkpoint of half of it would be wrong. Flower handles
    these signals by an exit in the middle of whatever runs, without a checkpoint. It still handles
    a second signal.
    """

    def __init__(self) -> None:
        self._received, self._waiting = False, False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals inside. In other threads than the main one, none arrives."""
        with ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                for number in SIGNALS:
                    before = signal.getsignal(number)
                    signal.signal(number, self._handler(before))
                    stack.callback(signal.signal, number, before)
            yield

    def _handler(self, before: Any) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            if self._received and callable(before):
                before(number, frame)
            self._received = True
            if self._waiting:
                self.check()

        return handle

    def check(self) -> None:
        """Check whether the run is to stop.

        Raises:
            StoppedError: If it is.
        """
        if self._received:
            self._waiting = False
            raise StoppedError("by Ctrl-C or a signal")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let a signal raise its error inside, where the state of the run does not change.

        Raises:
            StoppedError: If a signal has come before, or comes inside.
        """
        self.check()
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
