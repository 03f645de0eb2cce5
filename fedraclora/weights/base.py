"""Base weights and their version, as workers read them and the server replaces them."""

# A hook has arguments that an override uses.
# ruff: noqa: ARG002

from __future__ import annotations

from dataclasses import dataclass

from fedraclora.errors import WireError
from fedraclora.protocol.link import Link
from fedraclora.tree import Tree


@dataclass
class BaseWeights:
    """Base weights and the version they stand at.

    In one process the server and the workers share one such object: the server publishes, the
    workers read, and nothing is copied.
    """

    base: Tree
    version: int = 0

    def publish(self, base: Tree, version: int, link: Link | None = None) -> None:
        """Replace the weights by those of a later version.

        Args:
            base: The weights.
            version: Their version.
            link: How they follow from the version before; None if nothing changed.
        """
        self.base, self.version = base, version

    def close(self) -> None:
        """Remove what has been written for workers that are elsewhere."""

    def at(self, version: int, round_: int) -> Tree:
        """Return the weights, which must stand at ``version``.

        Raises:
            WireError: If they stand elsewhere.
        """
        if version != self.version:
            raise WireError(
                f"round {round_}: the replica holds version {self.version} of the base weights, "
                f"the server asks for {version}"
            )
        return self.base
