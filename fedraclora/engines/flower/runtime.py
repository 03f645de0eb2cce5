"""Flower's simulation runtime, in threads of this process.

It is Ray's actors behind Flower's in-memory link state, and it calls a ServerApp with the grid.
Here that ServerApp hands the grid over and waits, so that the strategy runs where it runs with
every other engine, and whatever goes wrong comes out of a call of the grid.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedraclora.engines.private_ray import LastWord, put_back
from fedraclora.errors import EngineError

if TYPE_CHECKING:
    from fedraclora.engines.ray.session import RaySession

# What they log as an error is raised here. (Ray sets the level of its upper logger at import.)
LOGGERS = ("flwr", "ray._private.worker")

Backend = dict[str, dict[str, Any]]


class Runtime:
    """Flower's simulation runtime in threads of this process.

    Args:
        app: The ClientApp.
        clients: Number of nodes.
        config: Flower's ``backend_config``.

    Attributes:
        ended: Set when the runtime has ended, for whatever reason.
    """

    def __init__(self, app: ClientApp, clients: int, config: Backend) -> None:
        self.app, self.clients, self.config = app, clients, config
        self.ended, self._done = Event(), Event()
        self._handed: SimpleQueue[Grid | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._broken: Exception | None = None
        self._session: RaySession | None = None
        self._last_word: LastWord | None = None

    def grid(self) -> Grid:
        """Start the runtime and give its grid.

        Raises:
            EngineError: If it does not start, or this process has a Ray already, which Flower would
                use and then end.
        """
        from fedraclora.engines.ray.session import RaySession

        self._session, self._last_word = RaySession(), LastWord()
        self._thread = Thread(target=self._run, name="flower", daemon=True)
        self._thread.start()
        grid = self._handed.get()
        if grid is None:
            raise self.error() or EngineError("Flower's runtime ended before it began")
        return grid

    def error(self) -> EngineError | None:
        """Return why the runtime failed; None if it did not."""
        if self._broken is None:
            return None
        first: BaseException = self._broken
        while first.__cause__ is not None:
            first = first.__cause__
        return EngineError(f"Flower's runtime failed: {type(first).__name__}: {first}")

    def close(self) -> None:
        """End it, and wait for the end."""
        if self._session is None:
            return
        try:
            with hushed():
                self._done.set()
                if self._thread is not None:
                    self._thread.join()
                self._session.close()
        finally:
            if self._last_word is not None:
                self._last_word.close()
            self._thread = self._session = self._last_word = None

    def keep_sigterm(self) -> None:
        """Let SIGTERM do what it did before Ray, which starts in a thread at some time, took it."""
        from fedraclora.engines.ray.session import set_sigterm

        if self._session is not None:
            set_sigterm(signal.getsignal(signal.SIGTERM))

    def _run(self) -> None:
        from flwr.simulation import run_simulation

        from fedraclora.engines.ray.session import deaf_children

        server = ServerApp()

        @server.main()
        def main(grid: Grid, _context: Context) -> None:
            self._handed.put(grid)
            # Flower's thread for this is no daemon: it must not outlive what it works for.
            while not self._done.wait(1.0) and threading.main_thread().is_alive():
                pass

        try:
            with own_environment(), deaf_children():
                run_simulation(server, self.app, self.clients, backend_config=self.config)
        except Exception as error:
            self._broken = error
        finally:
            self._done.set()
            self.ended.set()
            self._handed.put(None)


@contextmanager
def own_environment() -> Iterator[None]:
    """Quieten the logs, and put back what Flower changes."""
    before, loggers = dict(os.environ), [logging.getLogger(n) for n in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        put_back(before)


@contextmanager
def hushed() -> Iterator[None]:
    """Send what this process writes to its standard streams nowhere.

    With retries, Ray reports every process that ends as it was told to as an error: in Python on
    one stream, in C++ on the other, and there is no switch for it.
    """
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    copies = [(number, os.dup(number)) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in copies:
            os.dup2(nowhere, number)
        yield
    finally:
        for stream in streams:
            stream.flush()
        for number, copy in copies:
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
