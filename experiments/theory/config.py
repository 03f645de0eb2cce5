"""What to run: the ``key=value`` words of ``fedraclora theory``."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fedraclora.errors import ConfigError, unknown

SIZES = ("full", "small")


@dataclass(frozen=True)
class TheoryConfig:
    """What to run.

    Attributes:
        size: ``full``, or ``small``: one curve of each panel, and few rounds of it.
        seeds: Of sketches, cohorts and shuffles.
        jobs: Processes; null: the number of cores.
        out: The folder to write; null: a dated one.
    """

    size: str = "full"
    seeds: int = 20
    jobs: int | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        """Reject impossible settings."""
        if self.size not in SIZES:
            raise unknown("size", self.size, SIZES)
        if self.seeds < 2:
            raise ConfigError(f"seeds is {self.seeds}; a standard error needs 2 or more")
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"jobs is {self.jobs}; 1 or more is wanted")

    @property
    def number_of_jobs(self) -> int:
        """Processes."""
        return len(os.sched_getaffinity(0)) if self.jobs is None else self.jobs
