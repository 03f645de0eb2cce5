"""Log to Trackio: a local dashboard of Hugging Face, with the calls of Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping

import trackio

from fedraclora.run.callback import RunStart
from fedraclora.weights.files import flatten

PROJECT = "fedraclora"


class TrackioLogger:
    """Logs to the project ``TRACKIO_PROJECT`` below ``TRACKIO_DIR``; ``trackio show`` shows it."""

    def begin(self, run: RunStart, known: str | None) -> str | None:
        """Create a run with the config, or resume it."""
        name = known or run.title
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=name,
            config={key: str(value) for key, value in flatten(run.config).items()},
            resume="allow" if known else "never",
            embed=False,
        )
        return str(self.run.name)

    def row(self, round_: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a round, the round as the step."""
        self.run.log(dict(values), step=round_)

    def end(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """Finish."""
        del summary, failed
        self.run.finish()
