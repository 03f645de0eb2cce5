"""TensorBoard: event files in the run folder, in ``tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from torch.utils.tensorboard import SummaryWriter

from fedraclora.run.callback import RunStart


class TensorBoardLogger:
    """Writes event files; ``tensorboard --logdir RUN`` shows them.

    Without a run folder they go where TensorBoard puts them, ``runs/`` in the working folder.
    """

    def begin(self, run: RunStart, known: str | None) -> str | None:
        """Open an event file; what an earlier leg wrote of later rounds is hidden."""
        del known
        folder = None if run.folder is None else str(Path(run.folder) / "tensorboard")
        again = None if run.done == 0 else run.done + 1
        self.writer = SummaryWriter(folder, purge_step=again)
        if run.done == 0:
            text = yaml.safe_dump(dict(run.config), sort_keys=False)
            self.writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))
        return None

    def row(self, round_: int, values: Mapping[str, float]) -> None:
        """Write a number as a scalar of its name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, round_)
        self.writer.flush()

    def end(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """Close the file."""
        del summary, failed
        self.writer.close()
