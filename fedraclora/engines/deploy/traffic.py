"""What went over the wire, as it was serialised."""

from __future__ import annotations

from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid


@dataclass
class Traffic:
    """Bytes since the strategy last looked.

    Attributes:
        fetched: Payload by which clients caught up on base weights, what was sent again included.
        serialised: Messages in both directions, as Flower writes them.
        sent: Each message that went to a node, by its `id`: twice where it was sent twice, and not
            where its client was not there.
    """

    fetched: int = 0
    serialised: int = 0
    sent: list[int] = field(default_factory=list)

    def count(self, message: Message) -> None:
        """Add a message."""
        self.serialised += message_bytes(message)


def message_bytes(message: Message) -> int:
    """Count the bytes of a message as Flower sends it: a tree of objects, large arrays in parts."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def traffic_of(grid: Grid) -> Traffic | None:
    """Return what a grid counts; None where nothing is sent."""
    return getattr(grid, "traffic", None)


def taken_traffic(grid: Grid) -> Traffic | None:
    """Take what a grid has counted since it was last taken; None where nothing is sent."""
    found = traffic_of(grid)
    if found is not None:
        grid.traffic = Traffic()  # type: ignore[attr-defined]
    return found
