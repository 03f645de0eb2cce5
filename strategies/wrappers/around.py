"""Base of wrappers of methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from typing_extensions import override

from fedraclora.protocol.method import Cohort, Draw, Method, Plan, RoundInstructions, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.tree import Tree


@dataclass(frozen=True)
class MethodWrapper(Method):
    """Wrap another method.

    Attributes:
        inner: The wrapped method, which does not know the wrapper.
    """

    inner: Method

    @property
    @override
    def client_state(self) -> bool:
        return self.inner.client_state

    @property
    @override
    def looks_at_clients(self) -> bool:
        return self.inner.looks_at_clients

    @property
    @override
    def recurs(self) -> bool:
        return self.inner.recurs

    def at(self, state: State) -> tuple[Method, State]:
        """Return the inner method in a round, and its state."""
        return self.inner, state

    # What the inner method declares by itself.

    @override
    def _keeps_numbers(self) -> bool:
        return False

    @override
    def _ends_components(self) -> str:
        return ""

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        inner, at = self.at(state)
        return inner.open_round(at, round_, cohort, draw)

    @override
    def next_exchange(
        self, state: State, sent: RoundInstructions, uplinks: Uplinks
    ) -> RoundInstructions | None:
        inner, at = self.at(state)
        return inner.next_exchange(at, sent, uplinks)

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        inner, at = self.at(state)
        return inner.weights(at, draw, own)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        """Return the numbers for all layers, since the choice is not known in advance."""
        return self.inner.floats(plan, round_)


def inside(method: Method) -> Iterator[Method]:
    """Yield a method's wrappers from the outside in, and the method itself."""
    yield method
    while isinstance(method, MethodWrapper):
        method = method.inner
        yield method
