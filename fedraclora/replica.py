"""A worker's copy of the base weights, with its version."""

from __future__ import annotations

from dataclasses import dataclass

from fedraclora.errors import WireError
from fedraclora.tree import Tree


@dataclass
class Replica:
    """Base weights and the version they stand at.

    In one process the server and the workers share one replica: the server publishes, the
    workers read, and nothing is copied.
    """

    base: Tree
    version: int = 0

    def publish(self, base: Tree, version: int) -> None:
        """Replace the weights by those of a later version."""
        self.base, self.version = base, version

    def at(self, version: int, round_: int) -> Tree:
        """Give the weights, which must stand at ``version``.

        Raises:
            WireError: If they stand elsewhere.
        """
        if version != self.version:
            raise WireError(
                f"round {round_}: the replica holds version {self.version} of the base weights, "
                f"the server asks for {version}"
            )
        return self.base
