"""The interface of callbacks, which watch a run or end it early."""

# ruff: noqa: ARG002
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedraclora.run.ledger import Row
from fedraclora.tree import Tree


@dataclass(frozen=True)
class Begin:
    """The data that a callback gets when a run starts or is resumed.

    Attributes:
        title: One line: method, data, step size, seed.
        config: The whole config, as plain nested values.
        folder: The run folder; None where the run is in memory.
        done: The last round that was closed before; 0 at the beginning.
        facts: What the run learns, how, and what is not as it was asked for: values of JSON
            (`fedraclora.strategies.facts`).
    """

    title: str
    config: Mapping[str, object]
    folder: Path | None
    done: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


class Callback:
    """Base class of callbacks: every hook does nothing; override those that you need.

    Those of a program's own are given to ``fedraclora.simulate(callbacks=[...])``. They get copies,
    so that none of them can change the run, and what one raises stops it; it can be resumed.
    """

    def begin(self, run: Begin) -> None:
        """Prepare, before the first round of a new or resumed run."""

    def measure(self, weights: Tree, round_: int) -> Row:
        """Measure new weights, where these are evaluated (``evaluate.every``).

        Args:
            weights: The effective ones: name of a parameter -> tensor of its shape.
            round_: That has made them; 0: they are those that the run begins with.

        Returns:
            Columns for the row of the round; their names must be new ones.
        """
        return {}

    def row(self, row: Row) -> None:
        """See the row of a round, once it is written: what was measured is in ``row["metrics"]``.

        Of a round that was not measured (``evaluate.every``) that is ``{}``.
        """

    def ends(self, rows: Sequence[Row]) -> bool:
        """Return whether to end the run, from its rows only, so that a resumed run ends there, too.

        Args:
            rows: All so far, from round 0; ``rows[-1]["metrics"]`` has what was measured by name,
                for example ``accuracy``, and is ``{}`` where a round was not (``evaluate.every``).
        """
        return False

    def end(self, summary: Mapping[str, object], *, failed: bool) -> None:
        """Close what `begin` has opened.

        Args:
            summary: The final figures; empty where there are none.
            failed: Whether the run stopped before its end.
        """
