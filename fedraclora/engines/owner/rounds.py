"""Count the rounds in which the nodes of a data owner trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedraclora.engines.owner.entries import Entry

LAST = 1 << 10  # rounds that may still get messages


@dataclass
class RoundCount:
    """Count rounds by their messages, in the order of these.

    A round has several messages, also at several nodes, and counts once. If a node is asked for a
    round again after another round of the same run, it trains again, and the round counts again:
    the server chooses the numbers of rounds.

    Attributes:
        total: Rounds so far.
    """

    total: int = 0
    _nodes: dict[tuple[int, str], set[int]] = field(default_factory=dict)  # the latest round last
    _now: dict[tuple[int, int], str] = field(default_factory=dict)  # run and node -> round

    def add(self, entry: Entry) -> None:
        """Add a message, if it is one for which the node trained."""
        if entry.of is not None or not entry.is_training:
            return
        round_, at = (entry.run, entry.round), (entry.run, entry.node)
        left = self._now.get(at, entry.round) != entry.round
        if round_ not in self._nodes or (left and entry.node in self._nodes[round_]):
            self.total += 1
            self._nodes.pop(round_, None)
            self._nodes[round_] = set()
        self._nodes[round_].add(entry.node)
        self._now[at] = entry.round
        if len(self._nodes) > LAST:
            del self._nodes[next(iter(self._nodes))]

    def has(self, run: int, round_: str) -> bool:
        """Check whether a round is the one of its run that began last."""
        return next((r for n, r in reversed(self._nodes) if n == run), None) == round_
