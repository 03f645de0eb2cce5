"""What is checked before the first run of a study: no row stops it hours later, or misleads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedraclora.config.run_config import RunConfig
from fedraclora.config.settings import PretrainConfig
from fedraclora.errors import ConfigError, DataError, FedRacLoraError
from fedraclora.experiments.assemble import assemble
from fedraclora.experiments.study.file import Study, check_split, row_config
from fedraclora.experiments.study.tuning import Done, Line
from fedraclora.run.digests import data_files

PHASES = ("tune", "final")


def check_first_runs(study: Study, rows: Sequence[str], done: Done) -> None:
    """Put together the first run of each row, in either phase, as far as its first round.

    Args:
        study: The study.
        rows: Those that are to be run.
        done: Lines of what has run: a row that has begun can.

    Raises:
        ConfigError: If a row cannot begin, or is measured on the wrong split; all are named.
    """
    begun = {(line.get("row"), line.get("phase")) for line in done.values()}
    wrong: dict[str, str] = {}
    for row in rows:
        try:
            for phase in PHASES:
                if (config := row_config(study, row, phase)) is None:
                    continue
                check_split(study, phase, config)
                if (row, phase) not in begun:
                    _check_start(study, phase, config)
        except FedRacLoraError as error:
            wrong[row] = str(error)
    if wrong:
        lines = "".join(f"\n  row {row!r}: {why}" for row, why in wrong.items())
        raise ConfigError(
            f"{len(wrong)} of {len(rows)} rows of the study cannot be run, and nothing was run: "
            f"mend them, or leave them out{lines}"
        )


def _check_start(study: Study, phase: str, config: RunConfig) -> None:
    run = assemble(replace(config, pretrain=PretrainConfig()), None)
    run.close()
    answers = {"exact_match"} if config.evaluate.generate else set()
    known = {*run.built.task.metrics, "gap"} | answers
    wanted = study.chosen_by if phase == "tune" else study.metric
    if wanted not in known:
        raise ConfigError(
            f"{wanted} is not measured; its metrics are {', '.join(run.built.task.metrics)}: name "
            "one of them as the study's metric, or as tune.by"
        )


def check_same_data(study: Study, done: Mapping[str, Line], path: object) -> None:
    """Check that what has run was run on the files that the study would read now.

    Raises:
        DataError: If a file has changed, or is another one.
    """
    known = {line["row"] for line in done.values() if "data_files" in line}.intersection(study.rows)
    configs = {row: row_config(study, row, "final") for row in known}  # it may be about data
    now = {row: data_files(c.data) for row, c in configs.items() if c is not None}
    for line in done.values():
        found = now.get(line["row"])
        if found is not None and line.get("data_files", found) != found:
            raise DataError(
                f"{path}: {line['key']} ran on other data: {', '.join(_changed(line, found))} "
                "changed since. Restore the files, or take another folder (out)"
            )


def _changed(line: Line, found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Name the files whose digests are not those of a line."""
    then = {(key, n): d for key, files in line["data_files"].items() for n, d in files.items()}
    now = {(key, name): d for key, files in found.items() for name, d in files.items()}
    pairs = [pair for pair in dict.fromkeys([*then, *now]) if then.get(pair) != now.get(pair)]
    return [f"data.{key} ({name})" for key, name in pairs]
