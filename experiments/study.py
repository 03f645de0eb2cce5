"""``python -m experiments.study STUDY.yaml [KEY=VALUE ...]``: tune every row alike, run its seeds.

A study names a preset, the rows to compare, one grid that every row is tuned on (on a validation
split), and the seeds of the final runs; without ``tune`` all rows have the grid's one value, and
``--tuned-by`` takes what another study has tuned, of the same rows on a like task. Every
run that ends adds one line to ``runs.jsonl``; started again, the study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from experiments.choices import composed
from experiments.study_budget import budgets
from experiments.study_file import Job, Study
from experiments.study_table import (
    best_value,
    cost,
    draw,
    table,
    tuned_by,
    tuned_value,
    write_table,
)
from fedraclora.errors import FedRacLoraError
from fedraclora.ledger import Row, round_seconds

Plain = dict[str, object]


def run_job(job: Job) -> Plain:
    """Run one job in memory and give its line for runs.jsonl."""
    from experiments.assemble import assemble
    from fedraclora.config import from_plain
    from fedraclora.runfolder import provenance
    from strategies import METHODS
    from strategies.outcome import summarise

    began, used = time.perf_counter(), time.process_time()
    config = from_plain(composed(job.overrides), METHODS)
    line: Plain = {**vars(job), "key": job.key}
    if job.phase == "final":
        line |= {"config": config.digested, **provenance()}
    run = assemble(config, None)
    try:
        run.strategy.start(run.grid)
    except FedRacLoraError as error:  # a learning rate that diverges is a result, not a failure
        return line | {"diverged": str(error), "metrics": {}, "cpu_seconds": since(used)}
    rows = run.strategy.book.ledger.rows
    errors = [r["report"]["aggregation_error"] for r in rows if r.get("report")]  # type: ignore[index]
    line |= summarise(run, time.perf_counter() - began)
    line["cpu_seconds"] = since(used)
    line["curve"] = curve(rows)
    line["aggregation_error"] = statistics.mean(errors) if errors else 0.0
    return line


def since(used: float) -> float:
    """Processor seconds of this process since then: the cost of a run, on a busy machine too."""
    return round(time.process_time() - used, 3)


def curve(rows: list[Row]) -> list[Plain]:
    """Keep of a ledger what a figure needs: one point per measured round, with the time it took."""
    points: list[Plain] = []
    seconds = 0.0
    for row in rows:
        seconds += round_seconds(row)
        if row.get("metrics"):
            point = {"round": row["round"], "metrics": row["metrics"], "seconds": round(seconds, 3)}
            totals = {key: row[key] for key in ("uplink_total", "downlink_total")}
            points.append(point | totals)
            seconds = 0.0
    return points


def read_lines(path: Path) -> dict[str, Plain]:
    """Read what has run, by key; a torn last line is left out."""
    done: dict[str, Plain] = {}
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            done[line["key"]] = line
    return done


def execute(jobs: list[Job], done: dict[str, Plain], path: Path, workers: int) -> Iterator[Plain]:
    """Run the jobs that have not run, ``workers`` at a time; append and give each line."""
    todo = [job for job in jobs if job.key not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for future in as_completed([pool.submit(run_job, job) for job in todo]):
            line = future.result()
            with path.open("a") as file:
                file.write(json.dumps(line, default=str) + "\n")
            done[str(line["key"])] = line
            yield line


def run_all(jobs: list[Job], done: dict[str, Plain], path: Path, workers: int) -> None:
    """Run what has not run, and say how each ended."""
    for line in execute(jobs, done, path, workers):
        print(line["key"], line["metrics"], flush=True)


def main() -> None:
    """Run a study to its end."""
    parser = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of all runs")
    parser.add_argument("--metric", help="in place of the study's own")
    parser.add_argument("--tuned-by", metavar="FOLDER", type=Path, help="take that study's values")
    parser.add_argument("--out", type=Path, help="default: experiments/results/<name>")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="write the tables only")
    arguments = parser.parse_args()
    try:
        study = Study.read(arguments.study, arguments.overrides, arguments.metric)
        if source := arguments.tuned_by:
            other = Study.read(source / "study.yaml")
            study = tuned_by(study, other, read_lines(source / "runs.jsonl"), source)
    except FedRacLoraError as error:
        sys.exit(f"error: {error}")
    out = arguments.out or Path(__file__).parent / "results" / arguments.study.stem
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.jsonl"
    done = read_lines(path)
    if not arguments.table:
        (out / "study.yaml").write_text(study.text)
        tuning = [j for row in study.rows for j in study.jobs("tune", row, study.values(row))]
        run_all(tuning, done, path, arguments.jobs)
        coarse = {row: best_value(study, row, study.values(row), done) for row in study.rows}
        finer = [j for r, v in coarse.items() for j in study.jobs("tune", r, study.refined(v))]
        run_all(finer, done, path, arguments.jobs)
        while True:  # once more for each value that turned out to be unstable
            best = {row: tuned_value(study, row, done) for row in study.rows}
            final = [j for row, value in best.items() for j in study.jobs("final", row, [value])]
            if all(job.key in done for job in final):
                break
            run_all(final, done, path, arguments.jobs)
    write_table(table(study, done), out, cost(done))
    if equal := budgets(study, done):
        (out / "budgets.md").write_text(equal.markdown())
        equal.print()
    draw(study, done, out)


if __name__ == "__main__":
    main()
