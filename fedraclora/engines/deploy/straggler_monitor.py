"""Watch for stragglers: report late nodes, and find lost messages to send again.

A SuperLink counts a message as delivered when a node fetches it. If the connection breaks at that
moment, or the node has a new address, the message is lost although the node works, and Flower
reports no error. A node that is silent for long is therefore asked again for its clients. It
answers in order: if it answers this request but no earlier one, it did not receive the earlier
ones.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

from fedraclora.engines.deploy.node_registry import LATE, NodeRegistry

SILENT = 60.0  # seconds without a reply, after which Flower has also noticed a disconnected node
SETTLED = 5.0  # seconds after that reply for other replies on their way
OVERDUE = 30.0  # seconds beyond twice the median time until the operator hears who is silent
EXCHANGES = 10  # of one kind, whose times say what is usual


class Pace:
    """Remember in which time half of all replies came, in the last exchanges of each kind."""

    def __init__(self) -> None:
        self._halves: dict[str, deque[float]] = {}

    def usual(self, kind: str) -> float:
        """Return the median over the last exchanges of a kind, in seconds; infinite before any."""
        return median(self._halves[kind]) if kind in self._halves else math.inf

    def add(self, kind: str, half: float) -> None:
        """Record an exchange."""
        self._halves.setdefault(kind, deque(maxlen=EXCHANGES)).append(half)


class StragglerMonitor:
    """Watch the messages of one exchange.

    Args:
        registry: Asks their nodes.
        usual: Seconds in which half of all replies come in other exchanges.
    """

    def __init__(self, registry: NodeRegistry, usual: float = math.inf) -> None:
        self.registry, self.usual = registry, usual
        self.started_at = time.monotonic()
        self.took: list[float] = []  # seconds until each reply
        self._told = False
        self._since: dict[str, float] = {}
        self._asked: dict[int, tuple[str, float]] = {}  # node -> request, and when it was sent
        self._answered: dict[int, float] = {}  # node -> when its reply was seen

    def lost(self, waiting: Mapping[str, int]) -> list[str]:
        """Return the messages that their nodes did not receive; the caller sends them again.

        Args:
            waiting: The messages without a reply, by Flower's number of each, with its node.
        """
        now, found, settled = time.monotonic(), list[str](), set[int]()
        for name, node in waiting.items():
            since = self._since.setdefault(name, now)
            if node not in self._asked:
                if now > since + SILENT and (question := self.registry.retry_request(node)):
                    self._asked[node] = question, now
            elif node not in self._answered:
                if self.registry.has_answered(self._asked[node][0]):
                    self._answered[node] = now
            elif now >= self._answered[node] + SETTLED:
                settled.add(node)
                if since < self._asked[node][1]:
                    found.append(name)
        for node in settled:
            del self._asked[node], self._answered[node]
        return found

    def deadline(self, wait: float) -> float:
        """Return when to stop waiting: so many seconds beyond twice the median time of a reply."""
        return self.started_at + wait + 2 * self.half

    @property
    def half(self) -> float:
        """Return the seconds within which half of all replies came; there must be one."""
        return sorted(self.took)[(len(self.took) - 1) // 2]

    def overdue(self, who: Sequence[str]) -> str:
        """Say once whose reply has not come for long; empty before, and after that.

        Args:
            who: Those whose reply is waited for.
        """
        waited = time.monotonic() - self.started_at
        usual = 2 * self.half if self.took else 0.0
        if self._told or not who or waited < OVERDUE + usual:
            return ""
        self._told = True
        return f"no reply for {waited:.0f} s from {', '.join(sorted(who))}"

    def late(self, who: Sequence[str]) -> list[str]:
        """Record replies that arrived together; return a sentence if they were late.

        They are late beside the others of this exchange, or beside other exchanges: half of the
        nodes may have been away together.
        """
        took = time.monotonic() - self.started_at
        self.took += [took] * len(who)
        if not who:
            return []
        usual = min(self.half, self.usual)
        if took < LATE + 2 * usual:
            return []
        said = f"half of all {'by then' if usual == self.half else 'usually'} within {usual:.0f} s"
        return [f"{', '.join(sorted(who))} replied after {took:.0f} s, {said}"]
