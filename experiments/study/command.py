"""Tune every row of a study alike, and run its seeds.

    fedraclora study STUDY.yaml [KEY=VALUE ...]

A study names a preset, the rows to compare, one grid that every row is tuned on (on a validation
split), and the seeds of the final runs; without ``tune`` all rows have the grid's one value, and
``--tuned-by`` takes what another study has tuned, of the same rows on a like task. ``--tuning``
gives overrides to the tuning runs alone, and ``--row`` runs some of the rows; what is written shows
all that have run. Every run that ends adds one line to ``runs.jsonl``;
started again, the study goes on where it stopped. ``fedraclora compare experiment=STUDY`` does the
same and makes a leaderboard of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedraclora.experiments import RESULTS
from fedraclora.experiments.interrupt import in_order
from fedraclora.experiments.status import reported
from fedraclora.experiments.study.file import Study
from fedraclora.experiments.study.run import refuse_failed, run_study
from fedraclora.experiments.study.tuning import tuned_by


@reported
@in_order()
def main() -> int:
    """Run a study to its end."""
    parser = argparse.ArgumentParser(prog="fedraclora study", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of all runs")
    parser.add_argument("--metric", help="in place of the study's own")
    parser.add_argument(
        "--tuning", nargs="+", default=[], metavar="KEY=VALUE", help="of the tuning runs alone"
    )
    parser.add_argument("--tuned-by", metavar="FOLDER", type=Path, help="take that study's values")
    parser.add_argument("--out", type=Path, help="default: experiments/results/<name>")
    parser.add_argument(
        "--row", action="append", default=[], help="run this one of its rows, and others so named"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="write the tables only")
    arguments = parser.parse_args()
    out = arguments.out or RESULTS / arguments.study.stem
    study = Study.read(arguments.study, arguments.overrides, arguments.metric, arguments.tuning)
    if arguments.tuned_by:
        study = tuned_by(study, arguments.tuned_by)
    only = arguments.table
    _, failed = run_study(study, out, arguments.jobs, rows=arguments.row, table_only=only)
    refuse_failed(failed)
    return 0
