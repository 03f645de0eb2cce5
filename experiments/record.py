"""What a run that is elsewhere leaves here: config, ledger, curves and summary."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from fedraclora import plots
from fedraclora.ledger import Ledger
from fedraclora.runfolder import alone, begin, method_label

Plain = dict[str, object]


class Record:
    """The local folder of a run; as a context it is held for this process.

    Weights, chain and checkpoints stay where the server is.

    Args:
        folder: The folder.
        plain: The config.
        resume: Whether the run is there already.

    Raises:
        CheckpointError: If another process holds it, or a run is there that was not asked for.
    """

    def __init__(self, folder: Path, plain: Plain, *, resume: bool) -> None:
        self.folder, self.plain, self.resume = folder, plain, resume
        self._stack = ExitStack()

    def __enter__(self) -> Record:
        """Take hold of the folder."""
        self._stack.enter_context(alone(self.folder))
        if not self.resume:
            begin(self.folder, self.plain)
        self.ledger = Ledger(self.folder / "ledger.jsonl")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let it go."""
        self._stack.close()

    def take(self, row: Plain) -> None:
        """Keep a row; one that is known already changes nothing.

        A server that went on from a checkpoint writes rounds anew: they replace what came before.
        """
        if row in self.ledger.rows:
            return
        self.ledger.cut(int(str(row["round"])) - 1)
        self.ledger.append(row, sync=False)

    def draw(self) -> None:
        """Draw the curves, where the run asks for pictures."""
        output = self.plain.get("output")
        if isinstance(output, dict) and output.get("plots"):
            picture = self.folder / "curves.png"
            plots.curves(self.ledger.rows, picture, title=method_label(self.plain))
