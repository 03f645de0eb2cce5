"""Tune every row of a study on the same grid, and run it with several seeds.

    fedraclora study STUDY.yaml [KEY=VALUE ...]

A study names a preset, the rows to compare, one grid on which every row is tuned (on a validation
split), and the seeds of the final runs. Without ``tune``, the grid has one value for all rows;
``--tuned-by`` uses the values that another study has tuned for the same rows. ``--tuning`` adds
overrides to the tuning runs only. Optuna chooses the trials of ``fedraclora tune`` but not those of
a study: each row of a study tries the same values, so that no row gets a better search. ``--row``
runs only some rows; the tables contain all finished ones. Every finished run adds a line to
``runs.jsonl``, and the same command resumes the study. ``fedraclora compare study=STUDY`` does the
same and also writes a leaderboard.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fedraclora.commands import RESULTS
from fedraclora.commands.run_files import refuse_overwriting
from fedraclora.commands.status import explained
from fedraclora.commands.study.entries import (
    Done,
    Line,
    dropped,
    read_lines,
    score,
    tried_values,
    tuned_by,
    tuned_value,
)
from fedraclora.commands.study.file import (
    Job,
    Study,
    check_same,
    check_split,
    composed_run,
    refuse_lower,
    row_config,
)
from fedraclora.commands.study.tables import write_results
from fedraclora.config.run_config import RunConfig
from fedraclora.errors import ConfigError, DataError, DivergenceError, FedRacLoraError, unknown
from fedraclora.evaluation.metrics import lower_of
from fedraclora.limits import Count, limited
from fedraclora.run import packed
from fedraclora.run.digests import data_files
from fedraclora.run.ledger import Row, column, known_mean, metrics_of, round_seconds
from fedraclora.strategies.builder import RunBuilder
from fedraclora.terminal.opening import introduction
from fedraclora.wire.fields import printable

PHASES = ("tune", "final")


@limited("")
def run_study(
    study: Study,
    out: Path,
    jobs: Count = 1,
    *,
    rows: Sequence[str] = (),
    table_only: bool = False,
) -> tuple[dict[str, Line], dict[str, str]]:
    """Run or resume a study, and write study.yaml, table, budgets and figure.

    If a run fails, its row gets no further runs; the other rows continue.

    Args:
        study: The study.
        out: Folder of the results. Runs that have finished there are not repeated.
        jobs: Number of parallel runs, each in its own process.
        rows: The rows to run; empty for all. The tables contain every finished row.
        table_only: Run nothing; write table, budgets and figure of the finished runs.

    Returns:
        The lines of all finished runs, by key; and the reasons of failed rows (`refuse_failed`).

    Raises:
        ConfigError: If rows run under different conditions, a row cannot start, a row or the
            number of workers is invalid, or the folder has other files or another study's runs.
    """
    for row in rows:
        if row not in study.rows:
            raise unknown("row", row, study.rows)
    path, written = out / "runs.jsonl", out / "study.yaml"
    if not packed.exists(path) and not (written.is_file() and written.read_text() == study.text):
        refuse_overwriting(out, ("study.yaml", "table.md", "table.csv"))
    done, failed = read_lines(path), dict[str, str]()
    if not table_only:
        check_same(study)
        check_same_data(study, done, path)
        check_first_runs(study, [*(rows or study.rows)], done)

    def run(phase: str, values: Callable[[str], list[float]]) -> bool:
        out_of_it = {*failed, *(dropped(study, done) if phase == "final" else ())}
        running = [row for row in rows or study.rows if row not in out_of_it]
        planned = [job for row in running for job in study.jobs(phase, row, values(row))]
        return run_jobs(planned, done, path, jobs, study.metric, failed)

    if not table_only:
        out.mkdir(parents=True, exist_ok=True)
        packed.decompress(path)
        path.touch()  # from here on the folder is this study's
        written.write_text(study.text)
        run("tune", study.values)
        run("tune", lambda row: tried_values(study, row, done))
        while run("final", lambda row: [tuned_value(study, row, done)]):
            pass  # repeat while a value diverges in its final runs and the next best one is tried
    write_results(study, done, out, failed)
    return done, failed


def refuse_failed(failed: Mapping[str, str]) -> None:
    """Raise the errors of failed rows, after all results were written.

    Raises:
        FedRacLoraError: If a row failed.
    """
    if failed:
        lines = "".join(f"\n  row {row!r}: {why}" for row, why in failed.items())
        raise FedRacLoraError(
            f"{len(failed)} rows failed and are in no table. Give the same command to try them "
            f"again{lines}"
        )


def run_job(job: Job) -> Line:
    """Run one job in memory, and return its line for runs.jsonl."""
    from fedraclora.run.folder import provenance
    from fedraclora.strategies.runner import summarize

    began, used = time.perf_counter(), time.process_time()
    config = composed_run(job)
    line: Line = {**vars(job), "key": job.key}
    if files := data_files(config.data.group):
        line["data_files"] = files
    run = RunBuilder(config).ready()
    if job.phase == "final":
        line |= {"config": config.digested, **provenance(), "client_bytes": client_bytes(run)}
    try:
        run.start()
    except DivergenceError as error:  # a learning rate that diverges is a result, not a failure
        return line | {"diverged": str(error), "metrics": {}, "cpu_seconds": cpu_since(used)}
    finally:
        run.close()
    rows = run.strategy.recorder.ledger.rows
    measured = known_mean(rows, "report", "aggregation_error")
    line |= summarize(run, time.perf_counter() - began)
    line["metrics"] = metrics_of(line | {"clients": line.get("by_clients")})
    if not line["metrics"]:
        raise ConfigError("nobody measured it (it has no test samples): a study has to know it")
    line["cpu_seconds"] = cpu_since(used)
    line["server_cpu_seconds"] = server_cpu_seconds(rows)
    line["curve"] = curve(rows)
    if math.isfinite(measured):
        line["aggregation_error"] = measured
    return line


def cpu_since(used: float) -> float:
    """Return the processor seconds of this process since ``used``, whatever else is running."""
    return round(time.process_time() - used, 3)


def client_bytes(run: RunBuilder) -> int | None:
    """Count the bytes of the tensors that live while one client trains in round 1.

    This includes weights, frozen factors, trained parameters with their gradients and optimizer
    state, and the activations of a batch (`fedraclora.training.memory`). None for a single client
    per round, which is not measured.
    """
    from fedraclora.protocol.method import first_instructions
    from fedraclora.training.memory import LOOKED_AT, measure_memory

    if run.built.cohort < 2:
        return None
    memory = run.chunk.memory
    if memory is None:
        strategy = run.strategy
        sent = first_instructions(strategy.method, strategy.state, strategy.draw, 2)
        population = torch.arange(min(run.built.clients, LOOKED_AT))
        memory = measure_memory(run.trainer, strategy.state.base, sent, population)
    return memory.weights + memory.training(1)


def server_cpu_seconds(rows: Sequence[Row]) -> float:
    """Return the server's processor seconds per round, to open and close it: the median."""
    laps = column(rows, "cpu_seconds", "open") + column(rows, "cpu_seconds", "close")
    return round(float(np.median(laps[1:])), 6)


def curve(rows: Sequence[Row]) -> list[Line]:
    """Extract the points of a figure from a ledger: metrics, time and bytes of measured rounds."""
    points: list[Line] = []
    seconds = 0.0
    for row in rows:
        seconds += round_seconds(row)
        if metrics := metrics_of(row):
            point = {"round": row["round"], "metrics": metrics, "seconds": round(seconds, 3)}
            totals = {key: row[key] for key in ("uplink_total", "downlink_total")}
            points.append(point | totals)
            seconds = 0.0
    return points


def run_jobs(
    jobs: list[Job],
    done: dict[str, Line],
    path: Path,
    workers: int,
    metric: str,
    failed: dict[str, str],
) -> bool:
    """Run the unfinished jobs, ``workers`` at a time; append and print the result of each.

    A job that fails adds no line; its row and the reason are added to ``failed``.

    Returns:
        Whether any job was unfinished.

    Raises:
        ConfigError: If a finished job had other settings, or the metric is not measured.
    """
    for job in jobs:
        earlier = _decisive(done.get(job.key, {}).get("overrides", job.overrides))
        if earlier != _decisive(job.overrides):
            raise ConfigError(
                f"{path} has {job.key} run with {' '.join(earlier)}; this study would run it with "
                f"{' '.join(_decisive(job.overrides))}. Use another folder, or remove those lines"
            )
    unfinished, introduced = [job for job in jobs if job.key not in done], set[str]()
    for count, (job, line_of) in enumerate(endings(unfinished, workers), 1):
        if job.row in failed:
            continue
        try:
            line = line_of()
        except Exception as error:  # of this row: what other rows have run and will run stands
            if (reason := explained(error)) is None:
                traceback.print_exception(error)
                reason = f"{type(error).__name__}: {error}"
            failed[job.row] = f"{job.key}: {reason}"
            print(f"{printable(job.key)} failed: {reason}", flush=True)
            continue
        with path.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
        done[line["key"]] = line
        if (begins := line.get("begins")) and job.row not in introduced:
            introduced.add(job.row)
            facts = introduction(begins).items()
            print(f"{job.row}: {'; '.join(f'{key} {text}' for key, text in facts)}")
        print(f"[{count} of {len(unfinished)}] {outcome(job, line)}", flush=True)
        score(line, metric)  # fails after the first run if the metric is not measured
    return bool(unfinished)


def outcome(job: Job, line: Line) -> str:
    """Write what a run of a study gave, as a line of the terminal."""
    if "diverged" in line:
        result = f"diverged, {line['diverged'].partition('. ')[0]}"
    else:
        result = ", ".join(
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in line["metrics"].items()
        )
    return f"{job.phase} {printable(job.row)} {job.value:g}, seed {job.seed}: {result}"


def endings(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Callable[[], Line]]]:
    """Run jobs one after another in this process, or in parallel processes.

    Yields:
        A job, and a function that returns its line or raises its error. In this process the
        function runs the job.
    """
    if workers == 1:
        yield from ((job, partial(run_job, job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            running = {pool.submit(run_job, job): job for job in jobs}
            for future in as_completed(running):
                yield running[future], future.result
        finally:  # if the caller stops early, the waiting jobs are cancelled
            pool.shutdown(wait=False, cancel_futures=True)


def _decisive(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without those of data and output folders."""
    return [word for word in overrides if not word.startswith(("data.root=", "output"))]


def check_first_runs(study: Study, rows: Sequence[str], done: Done) -> None:
    """Build the first run of each row in each phase, up to its first round.

    Args:
        study: The study.
        rows: The rows to run.
        done: Lines of finished runs; rows that have some are not checked again.

    Raises:
        ConfigError: If rows cannot start, or evaluate the wrong split; it names all of them.
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
            f"{len(wrong)} of {len(rows)} rows of the study cannot be run, so nothing was run. "
            f"Correct them, or leave them out{lines}"
        )


def _check_start(study: Study, phase: str, config: RunConfig) -> None:
    run = RunBuilder(config, pretrain=False).ready()
    run.close()
    answers = {"exact_match"} if config.evaluate.generate else set()
    task = run.built.task
    known = {*task.measured, "gap"} | answers
    wanted = [study.metric, *([study.chosen_by] if phase == "tune" else [])]
    if lacking := [name for name in wanted if name not in known]:
        raise ConfigError(
            f"{lacking[0]} is not measured; its metrics are {', '.join(task.measured)}: name one "
            "of them as the study's metric, or as tune.by"
        )
    refuse_lower("the study", study.metric, lower_of(task.info))


def check_same_data(study: Study, done: Mapping[str, Line], path: object) -> None:
    """Check that finished runs used the data files that the study would read now.

    Raises:
        DataError: If a file has changed or was replaced.
    """
    known = {line["row"] for line in done.values() if "data_files" in line}.intersection(study.rows)
    configs = {row: row_config(study, row, "final") for row in known}  # rows may differ in data
    now = {row: data_files(c.data.group) for row, c in configs.items() if c is not None}
    for line in done.values():
        found = now.get(line["row"])
        if found is not None and line.get("data_files", found) != found:
            raise DataError(
                f"{path}: {line['key']} ran on other data: {', '.join(_changed(line, found))} "
                "changed since. Restore the files, or use another folder (out)"
            )


def _changed(line: Line, found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Name the data files whose digests differ from those of a line."""
    then = {(key, n): d for key, files in line["data_files"].items() for n, d in files.items()}
    now = {(key, name): d for key, files in found.items() for name, d in files.items()}
    pairs = [pair for pair in dict.fromkeys([*then, *now]) if then.get(pair) != now.get(pair)]
    return [f"data.{key} ({name})" for key, name in pairs]


def main(words: Sequence[str]) -> None:
    """Run a study."""
    parser = argparse.ArgumentParser(prog="fedraclora study", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of all runs")
    parser.add_argument("--metric", help="in place of the study's own")
    parser.add_argument(
        "--tuning", nargs="+", default=[], metavar="KEY=VALUE", help="of the tuning runs alone"
    )
    parser.add_argument("--tuned-by", metavar="FOLDER", type=Path, help="take that study's values")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"default: {RESULTS}/<name>",
    )
    parser.add_argument(
        "--row", action="append", default=[], help="run this one of its rows, and others so named"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="write the tables only")
    arguments = parser.parse_args(words)
    out = arguments.out or RESULTS / arguments.study.stem
    study = Study.read(arguments.study, arguments.overrides, arguments.metric, arguments.tuning)
    if arguments.tuned_by:
        study = tuned_by(study, arguments.tuned_by)
    only = arguments.table
    _, failed = run_study(study, out, arguments.jobs, rows=arguments.row, table_only=only)
    refuse_failed(failed)
