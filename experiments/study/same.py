"""What all rows of a comparison share: the task, the head policy, cohorts, batches, the budget.

Cohorts, partitions and batches are drawn from the seed alone (`fedraclora.rng`), so rows with the
same settings have the same ones. The tuning budget is the grid's, of as many values for each row.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from experiments.choices import composed
from experiments.study.file import Study
from fedraclora.config.run_config import from_plain
from fedraclora.errors import ConfigError
from fedraclora.weights.files import flatten
from strategies import METHODS

SHARED: list[str] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def check_same(study: Study) -> None:
    """Compose a final run of every row, and refuse rows that would not be compared alike.

    Args:
        study: Its ``varied`` names keys that may differ, since the study is about them.

    Raises:
        ConfigError: A row does not compose, or differs from the first one in a key of `SHARED`.
    """
    shared = tuple(f"{key}." for key in SHARED)
    free = tuple(f"{key}." for key in study.varied)
    first: tuple[str, dict[str, object]] | None = None
    for row in study.rows:
        job = study.jobs("final", row, study.values(row)[:1])[0]
        config = from_plain(composed(job.overrides), METHODS)
        found = {
            key: value
            for key, value in flatten(config.digested).items()
            if f"{key}.".startswith(shared) and not f"{key}.".startswith(free)
        }
        first = first or (row, found)
        for key in sorted({*first[1], *found}):
            mine, other = found.get(key), first[1].get(key)
            if mine != other:
                raise ConfigError(
                    f"row {row!r} has {key}={mine}, row {first[0]!r} has {key}={other}; all rows "
                    f"of a comparison share it: move it to overrides, or name it under varied"
                )
