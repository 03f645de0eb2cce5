"""The progress bar of a run."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fedraclora.ledger import headline, number


class RunProgress:
    """A rich bar: round, headline metric, bytes so far, seconds left.

    Args:
        rounds: Rounds in all.
        shown: False draws nothing.
        label: What runs.
    """

    def __init__(self, rounds: int, *, shown: bool, label: str) -> None:
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[metric]}"),
            TextColumn("{task.fields[moved]}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            disable=not shown,
        )
        self.task = self.bar.add_task(label, total=rounds, metric="", moved="")
        self._metric = ""

    def __enter__(self) -> RunProgress:
        """Start drawing."""
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop drawing, whatever happened."""
        self.bar.stop()

    def say(self, text: str) -> None:
        """Write a line above the bar."""
        if not self.bar.disable:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, row: dict[str, object]) -> None:
        """Draw a new ledger row."""
        name = headline([row])
        if name is not None:
            self._metric = f"{name} {number(row, 'metrics', name):.4f}"
        up, down = number(row, "uplink_total") / 1e6, number(row, "downlink_total") / 1e6
        self.bar.update(
            self.task,
            completed=number(row, "round"),
            metric=self._metric,
            moved=f"up {up:.2f} MB, down {down:.2f} MB",
        )
