"""Log to Weights & Biases, online or (``WANDB_MODE=offline``) in files."""

from __future__ import annotations

import os
from collections.abc import Mapping

import wandb

from fedraclora.run.callback import RunStart

PROJECT = "fedraclora"


class WandbLogger:
    """Logs to the project ``WANDB_PROJECT``; all else is as the library's own variables say."""

    def begin(self, run: RunStart, known: str | None) -> str | None:
        """Create a run with the config, or resume it."""
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.title,
            config=dict(run.config),
            dir=os.environ.get("WANDB_DIR") or (run.folder and str(run.folder)),
            id=known,
            resume="allow" if known else None,
            reinit="create_new",
        )
        return str(self.run.id)

    def row(self, round_: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a round, the round as the step."""
        self.run.log(dict(values), step=round_)

    def end(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """Write the final figures and finish."""
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=int(failed))
