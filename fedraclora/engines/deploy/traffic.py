"""What went over the wire, as it was serialised."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid


@dataclass
class Traffic:
    """Bytes since the strategy last looked.

    Attributes:
        fetched: Payload by which clients caught up on base weights, what was sent again included.
        serialised: Messages in both directions, as Flower writes them.
    """

    fetched: int = 0
    serialised: int = 0

    def count(self, message: Message) -> None:
        """Add a message."""
        self.serialised += message_bytes(message)


def message_bytes(message: Message) -> int:
    """Count the bytes of a message as Flower sends it: a tree of objects, large arrays in parts."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def taken_traffic(grid: Grid) -> Traffic | None:
    """Take what a grid has counted since it was last asked; None where nothing is sent."""
    found: Traffic | None = getattr(grid, "traffic", None)
    if found is not None:
        grid.traffic = Traffic()  # type: ignore[attr-defined]
    return found
