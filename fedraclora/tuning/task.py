"""Tune a task: set up the search from its config, run it, and write its results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from fedraclora.binding import PlainDict, section
from fedraclora.compose.resume import with_changes
from fedraclora.config.build import resolved
from fedraclora.config.builder import TaskBuilder
from fedraclora.config.run_config import TaskConfig, from_plain, task_from_plain
from fedraclora.config.table_rows import selection_of
from fedraclora.data.locate import user_path
from fedraclora.errors import ConfigError, unknown
from fedraclora.evaluation.metrics import higher_is_better, lower_of
from fedraclora.imports import import_extra
from fedraclora.run.callback import Callback
from fedraclora.run.folder import make
from fedraclora.run.log import LOG, logged
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.strategies.start import resolved_start
from fedraclora.tuning.rates import RATE_KEY
from fedraclora.tuning.result import TuningResult, outcome
from fedraclora.tuning.search import Search
from fedraclora.tuning.space import Space, TuneConfig, settings
from fedraclora.tuning.storage import keeping

FOLDER = "runs/tune"
log = logging.getLogger(__name__)


def tune_task(
    plain: PlainDict,
    typed: Collection[str],
    words: Sequence[str] = (),
    given: Mapping[str, object] | None = None,
    *,
    steps: Sequence[RoundStep] = (),
    callbacks: Sequence[Callback] = (),
) -> TuningResult:
    """Tune a task until the budget is spent, and print and write the results.

    Args:
        plain: The config of the task.
        typed: Keys of it that the user set, which are not tuned.
        words: ``tune.KEY=VALUE``.
        given: The same, by key, from Python.
        steps: The user's round steps, for each run.
        callbacks: The user's callbacks, likewise.

    Raises:
        ConfigError: If Optuna is not installed, or there is no key or no data to tune with.
        CheckpointError: If the folder holds another tuning, or a damaged one.
        OSError: If it cannot be written; finished runs are kept.
        KeyboardInterrupt: After the results so far are printed and written.
    """
    import_extra("optuna", "fedraclora tune")
    asked = settings(words, given or {})
    own = {word.removeprefix("tune.").partition("=")[0] for word in words} | {*(given or ())}
    output = section(plain, "output")
    folder = tune_folder(plain)
    if (folder / "ledger.jsonl").exists():
        raise ConfigError(f"{folder} holds a run: name another folder (output.dir) for the tuning")
    plain = {**resolved_start(resolved(plain)), "output": {**output, "dir": None}}
    if is_auto := section(plain, "local").get("lr") == "auto":  # is no rate
        typed = {*typed} - {RATE_KEY}
    space = Space.of(plain, typed, asked, own)
    refuse_if_none_runs(plain, space)
    share = held_out(task_from_plain(plain), asked)
    final = {"evaluate.split": "test", "data.validation": section(plain, "data")["validation"]}
    plain = with_changes(plain, {"evaluate.split": "validation", "data.validation": share})
    built = TaskBuilder(task_from_plain(plain), pretrain=False).built
    space = space.of_task(plain, built, auto=is_auto)
    task, metric = built.task, asked.metric or built.task.measured[0]
    if metric not in task.measured:
        raise unknown("tune.metric", metric, task.measured)
    higher = higher_is_better(metric, lower_of(task.info))
    make(folder, shared=bool(output.get("shared")))
    say = print if output.get("progress") else lambda _: None
    whose = space, asked, metric, higher, built.clients, folder
    search = Search(*whose, final, say, steps, callbacks)
    with keeping(folder), logged(folder):
        told = assumed(search, len(task.validation or ()), share)
        open_with(search, told, verbose=bool(output.get("verbose")))
        return ended(search, partial(outcome, search, has_test=len(task.test) > 0))


def refuse_if_none_runs(plain: PlainDict, space: Space) -> None:
    """Reject a task that none of the listed methods can run: no trial can mend it.

    Raises:
        ConfigError: What the first of them is refused for.
    """
    refused = list[ConfigError]()
    for method in space.methods.values():
        try:
            from_plain({**plain, "method": method}, METHODS)
        except ConfigError as error:
            refused.append(error)
        else:
            return
    raise refused[0]


def tune_folder(plain: Mapping[str, object]) -> Path:
    """Return the folder of a tuning."""
    return user_path("output.dir", section(plain, "output").get("dir") or FOLDER)


def open_with(search: Search, told: Mapping[str, str], *, verbose: bool) -> None:
    """Print the assumptions of a tuning, and its search space: only names, unless verbose.

    Everything goes to the log in its folder.
    """
    tried = {**search.space.description(), "never": "; ".join(map(" ".join, search.config.never))}
    for title, text in {**told, **tried}.items():
        log.info("%s: %s", title, text)
    shown = (
        tried
        if verbose
        else {"tried": f"{', '.join(search.space.description())} ({LOG} has values)"}
    )
    for title, text in {**told, **shown}.items():
        search.say(f"{title + ':':<24}{text}")


def ended(search: Search, found: Callable[..., TuningResult]) -> TuningResult:
    """Run the remaining trials, and print and write the results.

    Raises:
        KeyboardInterrupt: After the results so far are printed and written.
    """
    try:
        try:
            alone = search.run()
        except KeyboardInterrupt:
            found(over=False)
            raise
        if not alone:
            search.say("another process still runs: the last one tests the chosen settings")
        with search.turn():
            return found(over=alone)
    except KeyboardInterrupt as error:
        error.add_note("with the results so far; give the same command to resume")
        raise


def held_out(config: TaskConfig, asked: TuneConfig) -> float:
    """Return the share of training samples to hold out for tuning; 0 if the data have a split.

    Raises:
        ConfigError: If none can be held out, so that only test samples would be left.
    """
    if config.evaluate.by_clients:
        raise ConfigError(
            f"evaluate.clients={config.evaluate.clients} holds samples out by the seed, so "
            "tuning would train on test samples of other seeds. Leave it out for tuning."
        )
    data = config.data(clients=config.clients, seed=config.seed)
    if data.validation is not None:
        return 0.0
    if not len(data.train):
        raise ConfigError(
            f"data={config.data.name} has no validation split, since clients bring all "
            "training samples. Tune on data of a few clients that the server has: data=table, "
            "data=arrays, or a function of yours that returns them (data=module:FUNCTION, "
            "docs/own.md)."
        )
    return selection_of(config.data).validation or asked.validation


def assumed(search: Search, samples: int, share: float) -> dict[str, str]:
    """Describe the assumptions of a tuning: number of validation samples, and share held out."""
    whose = "held out of the training samples" if share else "those of the data"
    config, direction = search.config, "more" if search.higher else "less"
    units = ("runs", "core-hours", "MB both ways, of all clients")
    limits = zip((config.runs, config.core_hours, config.megabytes), units, strict=True)
    rungs = [str(round(share * search.rounds) or 1) for share in sorted(config.rungs)]
    listed = (config.seeds, config.test_seeds, config.sizes)
    seeds, tests, sizes = (", ".join(map("{:g}".format, values)) for values in listed)
    ends = f"at {', '.join(rungs)} all but the best {config.keep:g} end" if rungs else "none ends"
    return {
        "metric": f"{search.metric}, of which {direction} is better",
        "measured on": f"{samples} validation samples, {whose}; test samples are left for the end",
        "budget": ", ".join(f"{most:g} {unit}" for most, unit in limits if most),
        "rounds": f"{search.rounds}; {ends}",
        "sizes": f"{sizes} MB a client, both ways: at each a run counts at its last rounds there",
        "seeds": f"{seeds}; tested on {tests}",
        "kept in": f"{search.folder}",
    }
