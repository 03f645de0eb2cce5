"""What all rows of a comparison share: the task, the head policy, cohorts, batches, the budget.

And what none may do: be tuned on the samples on which it is measured at the end.

Cohorts, partitions and batches are drawn from the seed alone (`fedraclora.rng`), so rows with the
same settings have the same ones. The tuning budget is the grid's, of as many values for each row.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from fedraclora.config.run_config import RunConfig, from_plain
from fedraclora.errors import ConfigError
from fedraclora.experiments.choices import composed
from fedraclora.experiments.study.file import Study
from fedraclora.strategies import METHODS
from fedraclora.weights.files import flatten

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
        try:
            config = config_of(study, row, "final")
        except ConfigError as error:
            raise ConfigError(f"row {row!r}: {error}") from error
        if config is None:
            continue
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


def check_split(study: Study, phase: str, config: RunConfig) -> None:
    """Check that a row is tuned on the validation split, and not measured on it at the end.

    Args:
        study: The study.
        phase: tune or final.
        config: Of a run of the row in this phase.

    Raises:
        ConfigError: If it is not so.
    """
    if study.tune is None:
        return
    if phase == "tune" and config.evaluate.split != "validation":
        raise ConfigError(
            f"its tuning runs are measured on evaluate.split={config.evaluate.split}, so that its "
            "final runs would be measured on what they were tuned on: add "
            "evaluate.split=validation and data.validation=0.2, say, to tune.overrides"
        )
    if phase == "final" and config.evaluate.split == "validation":
        raise ConfigError(
            "its final runs are measured on evaluate.split=validation, on which it is tuned: take "
            "that out of overrides and final.overrides"
        )


def config_of(study: Study, row: str, phase: str) -> RunConfig | None:
    """Compose the first run of a row in a phase; None where it has none."""
    jobs = study.jobs(phase, row, study.values(row)[:1])
    return from_plain(composed(jobs[0].overrides), METHODS) if jobs else None
