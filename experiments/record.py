"""What a run that is elsewhere leaves here: config, ledger, curves and summary."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path

from fedraclora.config.schema import section
from fedraclora.experiments import Plain
from fedraclora.run.folder import alone, amend, begin, run_title
from fedraclora.run.ledger import Ledger


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
        self._new: list[Path] = []

    def __enter__(self) -> Record:
        """Take hold of the folder."""
        inside = [
            self.folder / name for name in (".lock", "config.yaml", "digests.json", "ledger.jsonl")
        ]
        outside = [self.folder, *self.folder.parents]
        self._new = [path for path in (*inside, *outside) if not path.exists()]
        with ExitStack() as stack:
            stack.enter_context(alone(self.folder))
            if self.resume:
                amend(self.folder, self.plain)
            else:
                begin(self.folder, self.plain)
            self.ledger = Ledger(self.folder / "ledger.jsonl")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Release the folder, with the curves of a run that did not come to its end."""
        with self._stack, suppress(OSError):  # which must not hide the error
            if kind is not None and self.ledger.rows:
                self.draw()

    def withdraw(self) -> None:
        """Remove what was not there before, for a run that was not taken: nothing is in the way."""
        for path in self._new:
            with suppress(OSError):  # a folder in which somebody has put something since
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)

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
        if section(self.plain, "output").get("plots"):
            from fedraclora.plots.run import run_curves

            picture = self.folder / "curves.png"
            rounds = int(str(self.plain["rounds"]))
            run_curves(self.ledger.rows, picture, run_title(self.plain), planned=rounds)
