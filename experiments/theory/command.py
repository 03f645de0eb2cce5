"""``fedraclora theory``: measured curves of convex problems beside the bounds on them.

Linear and logistic regression, by rank, sketch and side; gradient descent, SGD, reshuffling, and
federated rounds with all clients and with a cohort; blocks without replacement; links built on
those before them; the counter-example of arXiv 2410.08305, and one of a basis without a drawn
share. Everything runs through the framework's own loop. Keys:

  size=     full, or small: one curve of each panel and few rounds, to see that it works
  seeds=    of sketches, cohorts and shuffles; 20
  jobs=     processes; the number of cores
  out=      a folder; runs/theory/<date>/<time>

The exit status is 1 if a curve, three standard errors lower, crosses its bound.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from annotated_types import Ge
from rich.progress import track

from fedraclora.binding import build
from fedraclora.compose.words import key_values
from fedraclora.config.build import fix_bits
from fedraclora.experiments.theory import examples, verdict
from fedraclora.experiments.theory.cases import all_cases
from fedraclora.experiments.theory.figures import draw, report_tables, slowdowns
from fedraclora.experiments.theory.verdict import judge
from fedraclora.limits import Count, Limited, OneOf
from fedraclora.run.folder import provenance
from fedraclora.terminal.progress import plain_console

T = TypeVar("T")


def main(words: Sequence[str]) -> int:
    """Run it; status 1 for a curve that crosses its bound."""
    return run(build("theory", TheoryConfig, key_values(words)))


def run(config: TheoryConfig) -> int:
    """Run every case, write the folder, print the tables; give the exit status."""
    began = time.perf_counter()
    cases, seeds = all_cases(config.size), range(config.seeds)
    trials = {name: examples.trials(name, config.size, config.seeds) for name in examples.EXAMPLES}
    with workers(config.jobs) as pool:
        jobs = [(case, seed) for case in cases for seed in seeds]
        curves = pool.map(verdict.run, *zip(*jobs, strict=True), chunksize=4)
        paths = list(_shown(curves, len(jobs), "curves"))
        found, lost = (
            examples.outcomes_of(
                some, [*_shown(pool.map(examples.run_trial, some), len(some), name)]
            )
            for name, some in trials.items()
        )
    judged = [judge(c, paths[i * len(seeds) : (i + 1) * len(seeds)]) for i, c in enumerate(cases)]
    slow = slowdowns(judged)
    out = Path(config.out or f"runs/theory/{datetime.now():%Y-%m-%d/%H-%M-%S}")
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {
        **provenance(),
        "size": config.size,
        "seeds": len(seeds),
        "seconds": time.perf_counter() - began,
        "holds": all(j.holds for j in judged),
        "cases": [j.plain() for j in judged],
        "counter_example": [vars(outcome) for outcome in found],
        "noise_example": [vars(outcome) for outcome in lost],
        "slowdown": [vars(s) for s in slow],
    }
    (out / "theory.json").write_text(json.dumps(_short(report)) + "\n")
    made = report_tables(report)
    (out / "table.md").write_text("\n".join(table.markdown() for table in made))
    draw(judged, found, lost, slow, out)
    for table in made:
        table.print()
    crossed = [j.case.name for j in judged if not j.holds]
    print(
        f"{len(judged) - len(crossed)} of {len(judged)} cases within their bounds; written to {out}"
    )
    for name in crossed:
        print(f"error: {name} crosses its bound", file=sys.stderr)
    return 1 if crossed else 0


def workers(jobs: int) -> ProcessPoolExecutor:
    """Start processes of one thread each."""
    context, one_thread = multiprocessing.get_context("spawn"), (1, torch.device("cpu"))
    return ProcessPoolExecutor(jobs, context, fix_bits, one_thread)


def _shown(results: Iterator[T], total: int, what: str) -> Iterator[T]:
    console = plain_console(stderr=True)
    return iter(track(results, what, total, console=console, disable=not console.is_terminal))


def _short(report: object) -> object:
    """Keep six digits of every number, and write what is not finite as text."""
    return json.loads(
        json.dumps(report),
        parse_float=lambda text: float(f"{float(text):.6g}"),
        parse_constant=lambda text: str(float(text)),
    )


@dataclass(frozen=True)
class TheoryConfig(Limited):
    """What to run.

    Attributes:
        size: ``full``, or ``small``: one curve of each panel, and few rounds of it.
        seeds: Of sketches, cohorts and shuffles.
        jobs: Processes; the number of cores unless given.
        out: The folder to write; null: a dated one.
    """

    size: Annotated[str, OneOf(("full", "small"))] = "full"
    seeds: Annotated[int, Ge(2)] = 20  # fewer have no standard error
    jobs: Count = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    out: str | None = None
