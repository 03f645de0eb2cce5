"""What to run: the ``key=value`` words of ``fedraclora theory``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated

from fedraclora.limits import Count, Limited, choice_of, whole_from


@dataclass(frozen=True)
class TheoryConfig(Limited):
    """What to run.

    Attributes:
        size: ``full``, or ``small``: one curve of each panel, and few rounds of it.
        seeds: Of sketches, cohorts and shuffles.
        jobs: Processes; the number of cores unless given.
        out: The folder to write; null: a dated one.
    """

    size: Annotated[str, choice_of(("full", "small"))] = "full"
    seeds: Annotated[int, whole_from(2)] = 20  # fewer have no standard error
    jobs: Count = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    out: str | None = None
