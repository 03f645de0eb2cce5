"""``fedraclora compare experiment=STUDY [KEY=VALUE ...]``: run methods alike, and rank them.

All rows have the same task, head policy, cohorts, batches and tuning budget; what is best for each
on a validation split goes into its final runs. Started again, it goes on where it stopped. Keys:

  experiment=  a study: a name of experiments/studies, or a YAML file of one's own
  methods=     rows of it to compare, with commas, instead of all; a method that has no row is taken
               as its YAML in conf/method has it
  preset=      in place of the study's own (conf/experiment)
  metric=      in place of the study's own
  target=      value of the metric to be reached, in place of the study's own
  tuned_by=    a folder of results: take the learning rates of that study, and tune nothing
  jobs=        runs at a time (1)
  out=         folder of the results (runs/compare/STUDY)
  table=true   write tables and figures of what has run, and run nothing

Every other key is an override of all runs, as in ``fedraclora simulate``. The folder gets
leaderboard.md, leaderboard.csv, leaderboard.png, and what ``experiments.study`` writes: table.md,
budgets.md (at equal bytes), compare.png (the curves), study.yaml and runs.jsonl (a line per run).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedraclora.errors import ConfigError, unknown
from fedraclora.experiments.choices import groups
from fedraclora.experiments.study.file import Study
from fedraclora.experiments.study.leaderboard import write_leaderboard
from fedraclora.experiments.study.run import refuse_failed, run_study
from fedraclora.experiments.study.tuning import tuned_by
from fedraclora.experiments.words import key_values, part

STUDIES = Path(__file__).parents[1] / "studies"
KEYS = ("experiment", "methods", "preset", "metric", "target", "tuned_by", "jobs", "out", "table")


def is_study(words: Sequence[str]) -> bool:
    """Check whether the words of ``compare`` ask for a study, not for folders of runs."""
    return any(word.startswith("experiment=") for word in words)


def compare_study(words: Sequence[str]) -> None:
    """Run what the words ask for; see the module's docstring.

    Args:
        words: KEY=VALUE.

    Raises:
        ConfigError: For a word, a study or a row that is not known.
    """
    options, overrides = part(words, KEYS)
    key_values(overrides)  # each is KEY=VALUE
    name = str(options["experiment"])
    study = chosen(find(name), options, overrides)
    out = Path(str(options.get("out", Path("runs/compare") / Path(name).stem)))
    jobs = options.get("jobs", 1)
    if not isinstance(jobs, int) or jobs < 1:
        raise ConfigError(f"jobs is {jobs!r}; runs at a time, 1 or more, are wanted")
    done, failed = run_study(study, out, jobs, table_only=options.get("table") is True)
    made = write_leaderboard(study, done, out, failed)
    if made is None:
        refuse_failed(failed)
        raise ConfigError(f"{out} has no method whose final runs are all there and did not diverge")
    made.print()
    names = ("leaderboard.md", "leaderboard.csv", "leaderboard.png", "budgets.md", "compare.png")
    there = [name for name in names if (out / name).is_file()]  # one row alone has no budgets
    print(f"written: {out}/{', '.join(there)} and more")
    refuse_failed(failed)


def find(name: str) -> Path:
    """Find a study: by its name in experiments/studies, or its file.

    Raises:
        ConfigError: If there is none.
    """
    known = {path.stem: path for path in sorted(STUDIES.glob("*.yaml"))}
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in known:
        raise unknown("study", name, known)
    return known[name]


def chosen(path: Path, options: dict[str, object], overrides: Sequence[str]) -> Study:
    """Read a study, and change it as the words say."""
    study = Study.read(path, overrides)
    names = {"metric": "metric", "preset": "experiment"}
    changes = {name: options[key] for key, name in names.items() if key in options}
    if "target" in options:
        changes["target"] = _number("target", options["target"])
    if "methods" in options:
        rows = [row.strip() for row in str(options["methods"]).split(",")]
        known = {row: [f"method={row}"] for row in groups()["method"]} | dict(study.rows)
        more = {row: [*known[row]] for row in rows if row in known}
        changes |= {"only": rows, "more": more}
    if changes:
        study = study.changed(**changes)
    if "tuned_by" in options:
        study = tuned_by(study, Path(str(options["tuned_by"])))
    return study


def _number(key: str, value: object) -> float:
    try:
        return float(str(value))
    except ValueError as error:
        raise ConfigError(f"{key} is {value!r}; a number is wanted") from error
