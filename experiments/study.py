"""``python -m experiments.study STUDY.yaml``: tune each row with one budget, then run its seeds.

A study names a preset, the rows to compare, one grid that every row is tuned on (on a validation
split), and the seeds of the final runs. Every run that ends adds one line to ``runs.jsonl``;
started again, the study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import yaml

from experiments.simulate import CONF
from fedraclora.errors import ConfigError, FedRacLoraError, unknown

KEYS = {"experiment", "metric", "grid", "tune", "final", "rows"}
Plain = dict[str, object]


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    phase: str  # tune | final
    row: str
    value: float
    seed: int
    overrides: tuple[str, ...]

    @property
    def key(self) -> str:
        """Names the run in runs.jsonl."""
        return f"{self.phase}|{self.row}|{self.value}|{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study as its YAML file says."""

    experiment: str
    metric: str
    grid: Mapping[str, object]
    tune: Mapping[str, object]
    final: Mapping[str, object]
    rows: Mapping[str, Sequence[str]]

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a study.

        Raises:
            ConfigError: If keys are missing or unknown.
        """
        if not path.is_file():
            raise ConfigError(f"there is no study {path}; see experiments/studies")
        loaded = yaml.safe_load(path.read_text())
        for key in loaded:
            if key not in KEYS:
                raise unknown("study key", key, KEYS)
        if KEYS - set(loaded):
            raise ConfigError(f"{path} lacks {', '.join(sorted(KEYS - set(loaded)))}")
        return cls(**loaded)

    def jobs(self, phase: str, row: str, values: Sequence[float]) -> list[Job]:
        """List the runs of one row in one phase."""
        section = self.tune if phase == "tune" else self.final
        seeds, extra = section["seeds"], section["overrides"]
        common = [f"experiment={self.experiment}", *self.rows[row], *map(str, _list(extra))]
        return [
            Job(phase, row, v, int(str(s)), (*common, f"{self.grid['key']}={v}", f"seed={s}"))
            for v in values
            for s in _list(seeds)
        ]

    @property
    def values(self) -> list[float]:
        """The grid."""
        return [float(str(v)) for v in _list(self.grid["values"])]


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ConfigError(f"a study wants a list, but has {value!r}")
    return value


def run_job(job: Job) -> Plain:
    """Run one job in memory and give its line for runs.jsonl."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from experiments.assemble import assemble
    from experiments.simulate import summarise
    from fedraclora.config import from_plain
    from strategies import METHODS

    began = time.perf_counter()
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        composed = compose("config", overrides=list(job.overrides))
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    if not isinstance(plain, dict):
        raise ConfigError("the config must be a mapping")
    line: Plain = {**vars(job), "key": job.key}
    run = assemble(from_plain({str(k): v for k, v in plain.items()}, METHODS), None)
    try:
        run.strategy.start(run.grid)
    except FedRacLoraError as error:  # a learning rate that diverges is a result, not a failure
        return line | {"diverged": str(error), "metrics": {}}
    rows = run.strategy.book.ledger.rows
    errors = [r["report"]["aggregation_error"] for r in rows if r.get("report")]  # type: ignore[index]
    line |= summarise(run, time.perf_counter() - began)
    line["curve"] = [
        {"round": r["round"], "uplink": r["uplink_total"], "downlink": r["downlink_total"]}
        | dict(r["metrics"])  # type: ignore[call-overload]
        for r in rows
        if r.get("metrics")
    ]
    line["aggregation_error"] = statistics.mean(errors) if errors else 0.0
    return line


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


def score(line: Plain, metric: str) -> float:
    """Final metric of a run; minus infinity if it diverged."""
    metrics = line["metrics"]
    return float(metrics[metric]) if isinstance(metrics, dict) and metrics else float("-inf")


def best_value(study: Study, row: str, done: Mapping[str, Plain]) -> float:
    """Give the grid value with the best mean validation metric (the smaller one in a tie)."""
    means = {
        v: statistics.mean(score(done[j.key], study.metric) for j in study.jobs("tune", row, [v]))
        for v in study.values
    }
    return max(study.values, key=lambda v: (means[v], -v))


def table(study: Study, done: Mapping[str, Plain]) -> list[dict[str, object]]:
    """Make the table of the rows whose final runs are all there."""
    found = []
    for row in study.rows:
        if not all(j.key in done for j in study.jobs("tune", row, study.values)):
            continue
        value = best_value(study, row, done)
        keys = [j.key for j in study.jobs("final", row, [value])]
        lines = [done[k] for k in keys if k in done]
        if len(lines) < len(keys):
            continue
        scores = [score(line, study.metric) for line in lines]
        edge = value in {study.values[0], study.values[-1]}
        found.append(
            {
                "method": row,
                str(study.grid["key"]): f"{value:g}{' (edge of the grid)' if edge else ''}",
                "seeds": len(lines),
                study.metric: round(statistics.mean(scores), 4),
                "std": round(statistics.stdev(scores), 4) if len(scores) > 1 else 0.0,
                "uplink floats": lines[0]["uplink_floats"],
                "uplink MB": round(float(str(lines[0]["uplink_total"])) / 1e6, 2),
                "downlink MB with catch-up": round(
                    statistics.mean(float(str(x["downlink_total"])) for x in lines) / 1e6, 2
                ),
                "aggregation error": round(
                    statistics.mean(float(str(x["aggregation_error"])) for x in lines), 4
                ),
            }
        )
    return found


def write_table(rows: list[dict[str, object]], out: Path) -> None:
    """Write table.md and table.csv."""
    if not rows:
        return
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(str(row[n]) for n in names)} |" for row in rows]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def draw(study: Study, done: Mapping[str, Plain], out: Path) -> None:
    """Draw the final runs: metric against rounds and bytes."""
    from fedraclora.plots import compare_figure

    groups = {}
    for row in table(study, done):
        value = float(str(row[str(study.grid["key"])]).split()[0])
        lines = [done[j.key] for j in study.jobs("final", str(row["method"]), [value])]
        groups[str(row["method"])] = [
            [
                {
                    "round": p["round"],
                    "metrics": {study.metric: p[study.metric]},
                    "uplink_total": p["uplink"],
                    "downlink_total": p["downlink"],
                    "seconds": {},
                }
                for p in line["curve"]  # type: ignore[attr-defined]
            ]
            for line in lines
        ]
    if groups:
        compare_figure(groups, study.metric, out / "compare.png")


def main() -> None:
    """Run a study to its end."""
    parser = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, help="default: experiments/results/<name>")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="write the tables only")
    arguments = parser.parse_args()
    try:
        study = Study.read(arguments.study)
    except FedRacLoraError as error:
        sys.exit(f"error: {error}")
    out = arguments.out or Path(__file__).parent / "results" / arguments.study.stem
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.jsonl"
    done = read_lines(path)
    if not arguments.table:
        (out / "study.yaml").write_text(arguments.study.read_text())
        tuning = [j for row in study.rows for j in study.jobs("tune", row, study.values)]
        for line in execute(tuning, done, path, arguments.jobs):
            print(line["key"], line["metrics"], flush=True)
        final = [
            j
            for row in study.rows
            for j in study.jobs("final", row, [best_value(study, row, done)])
        ]
        for line in execute(final, done, path, arguments.jobs):
            print(line["key"], line["metrics"], flush=True)
            write_table(table(study, done), out)
    write_table(table(study, done), out)
    draw(study, done, out)
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
