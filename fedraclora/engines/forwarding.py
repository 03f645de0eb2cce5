"""Grids that stand before Flower's own, inside a ServerApp."""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.serverapp import Grid
from flwr.supercore.run import Run
from typing_extensions import override

from fedraclora.engines.local import MessageGrid
from fedraclora.errors import EngineError


class ForwardingGrid(MessageGrid):
    """A grid whose run is that of Flower's own; subclasses say who is asked, and how.

    Args:
        grid: Flower's own.
        ended: Tells whether the runtime has ended: nobody will reply.
        pause: Seconds between looks for replies.
    """

    def __init__(self, grid: Grid, *, ended: Callable[[], bool], pause: float) -> None:
        super().__init__()
        self.grid, self.ended, self.pause = grid, ended, pause

    @override
    def set_run(self, run: Run) -> None:
        self.grid.set_run(run)

    @property
    @override
    def run(self) -> Run:
        return self.grid.run

    def wait(self, what: str) -> None:
        """Wait a moment.

        Args:
            what: For what, for the message.

        Raises:
            EngineError: If the runtime has ended.
        """
        time.sleep(self.pause)
        if self.ended():
            raise EngineError(f"Flower's runtime ended before {what}")
