"""Define callbacks, which watch a run or end it early."""

# ruff: noqa: ARG002
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedraclora.run.ledger import Row
from fedraclora.tree import Tree


@dataclass(frozen=True)
class RunStart:
    """Hold the data that a callback receives when a run starts or is resumed.

    Attributes:
        title: One line: method, data, step size, seed.
        config: The whole config, as plain nested values.
        folder: The run folder; None if the run is in memory.
        done: The last finished round; 0 for a new run.
        facts: Facts on task, method and changed settings: values of JSON
            (`fedraclora.strategies.facts`).
    """

    title: str
    config: Mapping[str, object]
    folder: Path | None
    done: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


class Callback:
    """Base class of callbacks: every hook does nothing; override those that you need.

    Pass your own to ``fedraclora.simulate(callbacks=[...])``. They receive copies, so that they
    cannot change the run. An exception in one stops the run, which can be resumed.
    """

    def begin(self, run: RunStart) -> None:
        """Prepare, before the first round of a new or resumed run."""

    def measure(self, weights: Tree, round_: int) -> Row:
        """Measure new weights in the rounds that are evaluated (``evaluate.every``).

        Args:
            weights: The effective weights: name of a parameter -> tensor of its shape.
            round_: Their round; 0: the initial weights.

        Returns:
            Columns for the row of the round; their names must be new.
        """
        return {}

    def row(self, row: Row) -> None:
        """Read the row of a round after it is written; ``row["metrics"]`` has its metrics.

        For a round without evaluation (``evaluate.every``) that is ``{}``.
        """

    def ends(self, rows: Sequence[Row]) -> bool:
        """Return whether to end the run, from its rows only, so that a resumed run ends there, too.

        Args:
            rows: All rows so far, from round 0; ``rows[-1]["metrics"]`` has the metrics by name,
                for example ``accuracy``, and is ``{}`` for a round without evaluation
                (``evaluate.every``).
        """
        return False

    def end(self, summary: Mapping[str, object], *, failed: bool) -> None:
        """Release the resources that `begin` acquired.

        Args:
            summary: The final figures; empty if there are none.
            failed: Whether the run stopped before its end.
        """
