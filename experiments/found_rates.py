"""Hold the rate that each method finds by itself to the best rate of a ladder.

    python -m fedraclora.experiments.found_rates TASK [METHOD ...] [KEY=VALUE ...]

TASK is one of `TASKS`. Each method of ``conf/method`` runs once with its defaults alone
(``local.lr=auto``), which tells whether any fails. Then each runs at fixed rates a factor 3.2 apart
around the one that it found, further up or down until the best has a worse one on either side. Runs
are appended to ``results/found_rates/TASK.jsonl`` as they come: the same command goes on where it
was stopped, and writes ``TASK.md`` anew after each run. Test figures of seed 0; they choose nothing
in the runs.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedraclora.commands import RESULTS
from fedraclora.compose import CONF
from fedraclora.compose.overrides import composed
from fedraclora.config.build import PreparedTask, resolved
from fedraclora.config.run_config import from_plain
from fedraclora.errors import ConfigError, FedRacLoraError, unknown
from fedraclora.evaluation.metrics import PERSONAL
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.rate_search import STEP
from fedraclora.strategies.runner import execute

SHORT = ("clients_per_round=4", "local.steps=4")
TASKS = {  # the words of each, and the metric that counts
    "digits": (("evaluate.every=150",), "accuracy"),
    "flights": (
        ("experiment=flights", "local.clip=null", "local.clip_by=all", "local.steps=40"),
        "accuracy",
    ),
    "rotten_tomatoes": (
        (
            "experiment=rotten_tomatoes",
            "local.full_lr=null",
            "rounds=16",
            "evaluate.every=16",
            *SHORT,
        ),
        "accuracy",
    ),
    "rotten_tomatoes_whole": (  # the preset at its own length
        ("experiment=rotten_tomatoes", "local.full_lr=null", "evaluate.every=24"),
        "accuracy",
    ),
    "smollm2": (
        (
            "experiment=smollm2_instructions",
            "evaluate.generate=null",
            "evaluate.answers=64",
            "evaluate.new_tokens=32",
            "evaluate.shown=4",
            "evaluate.every=3",
            "local.batch_size=2",
            *SHORT,
        ),
        "loss",
    ),
}
FURTHEST = 6  # steps from the rate that was found
Result = dict[str, object]


@dataclass
class Ladder:
    """The runs of one task.

    Attributes:
        task: Its name.
        more: Words beside those of the task.
        folder: Where results are kept.
    """

    task: str
    more: Sequence[str] = ()
    folder: Path = RESULTS / "found_rates"
    runs: dict[tuple[str, str], Result] = field(default_factory=dict)
    prepared: PreparedTask | None = None  # data and model, which are the same in all runs

    def __post_init__(self) -> None:
        """Read what there is."""
        self.words, self.metric = TASKS[self.task]
        self.file = self.folder / f"{self.task}.jsonl"
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        for result in map(json.loads, lines):
            self.runs[result["method"], result["lr"]] = result

    def run(self, method: str, rate: str) -> Result:
        """Run a method at a rate, unless it has been; one that fails says why."""
        if (method, rate) not in self.runs:
            result: Result = {"method": method, "lr": rate}
            words = [*self.words, *self.more, f"method={method}", f"local.lr={rate}"]
            words += ["output.progress=false", "output.dir=null"]
            run = RunBuilder(from_plain(resolved(composed(words)), METHODS))
            self.prepared = self.prepared or run.built
            run.built = copy.deepcopy(self.prepared)
            try:
                summary = execute(run).summary
                result |= {"metrics": summary["metrics"], "seconds": summary["seconds"]}
            except FedRacLoraError as error:
                result["failed"] = f"{type(error).__name__}: {error}"[:300]
            if run.found is not None:
                result |= {"found": run.found.rate, "how": run.found.how, "share": run.found.share}
                result |= {"rates": len(run.found.ladder), "search": run.found.seconds}
            self.runs[method, rate] = result
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(json.dumps(result) + "\n")
            self.write()
        return self.runs[method, rate]

    def score(self, result: Result) -> float:
        """Return its metric, greater is better; minus infinity where it failed."""
        metrics = result.get("metrics")
        names = (self.metric, f"{PERSONAL}{self.metric}")  # of clients' own models, where they are
        known = metrics if isinstance(metrics, dict) else {}
        value = next((known[name] for name in names if name in known), None)
        if value is None:
            return -math.inf
        return -float(value) if self.metric == "loss" else float(value)

    def shown(self, result: Result) -> str:
        """Write the metric of a run."""
        value = abs(self.score(result))
        return f"{value:.4f}" if math.isfinite(value) else "failed"

    def climb(self, method: str) -> None:
        """Run a method at rates around the one that it found."""
        own = self.run(method, "auto")
        middle = float(str(own.get("found", 0.1)))
        scores = {0: self.score(own)}  # which is that of the rate, typed

        def at(place: int) -> None:
            scores[place] = self.score(self.run(method, f"{middle * STEP**place:.2g}"))

        for way in (-1, 1):
            at(way)
        for way in (-1, 1):
            while abs(end := max(scores, key=lambda p: way * p)) < FURTHEST:
                if max(scores, key=lambda p: scores[p]) != end:
                    break
                at(end + way)

    def table(self) -> str:
        """Write the table: a row for each method that has run; without a ladder it ends early."""
        of_best = ["best of the ladder", f"{self.metric} there"]
        head = ["method", "rate found", self.metric, *of_best, "behind"]
        rows = [head, ["---", *["---:"] * (len(head) - 1)]]
        for method in sorted(m for m, rate in self.runs if rate == "auto"):
            own = self.runs[method, "auto"]
            others = [r for (m, rate), r in self.runs.items() if m == method and rate != "auto"]
            best = max([*others, own], key=self.score)
            rate = str(own.get("found", ""))
            found = [f"`{method}`", rate, self.shown(own)]
            there = rate if best is own else str(best["lr"])
            gap = self.score(best) - self.score(own)
            behind = f"{gap:+.4f}" if math.isfinite(gap) else ""
            rows.append(
                [*found, there, self.shown(best), behind] if others else [*found, "", "", ""]
            )
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def write(self, out: Path | None = None) -> None:
        """Write the table beside the runs, or into another folder."""
        if self.runs:
            ((out or self.folder) / f"{self.task}.md").write_text(self.table())


def main(words: Sequence[str]) -> None:
    """Run what is missing.

    Raises:
        ConfigError: If there is no such task or method.
    """
    if not words:
        raise ConfigError(f"name a task: {', '.join(TASKS)}")
    task, *rest = words
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    known = [path.stem for path in sorted((CONF / "method").glob("*.yaml"))]
    named = [word for word in rest if "=" not in word]
    for method in named:
        if method not in known:
            raise unknown("method", method, known)
    ladder = Ladder(task, [word for word in rest if "=" in word])
    for method in named or known:
        ladder.run(method, "auto")
    for method in named or known:
        ladder.climb(method)


if __name__ == "__main__":
    main(sys.argv[1:])
