"""``fedraclora tune``: find settings of a task that no other beats in metric and bytes at once.

    fedraclora tune [tune.KEY=VALUE ...] [OVERRIDE ...]

The other words are those of simulate: the task, and what is not to be tuned. What is tried, within
which budget, and what never is stands in conf/tune.yaml. Everything is kept in output.dir
(runs/tune where none is named): the same command goes on, and several at a time share the work.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedraclora.binding import PlainDict, bind, section
from fedraclora.clients.engines import engine_of
from fedraclora.config.build import settled
from fedraclora.config.run_config import TaskConfig, from_plain, parted, task_from_plain
from fedraclora.config.settings import PretrainConfig
from fedraclora.data import DATASETS
from fedraclora.data.locate import user_path
from fedraclora.errors import ConfigError, ModelError
from fedraclora.evaluation.metrics import higher_is_better, lower_of
from fedraclora.experiments.overrides import composed, is_override, key_of
from fedraclora.experiments.resume import laid_over
from fedraclora.experiments.status import in_order, reported
from fedraclora.experiments.tune.result import Tuned, outcome
from fedraclora.experiments.tune.search import Search
from fedraclora.experiments.tune.space import Space, TuneConfig, settings
from fedraclora.run.callback import Callback
from fedraclora.run.folder import make
from fedraclora.strategies import METHODS
from fedraclora.strategies.assembly import Assembled, assemble_with
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.strategies.start import settled_start

FOLDER = "runs/tune"


def tune_task(
    plain: PlainDict,
    said: Collection[str],
    words: Sequence[str] = (),
    given: Mapping[str, object] | None = None,
    *,
    steps: Sequence[RoundStep] = (),
    callbacks: Sequence[Callback] = (),
) -> Tuned:
    """Tune a task until the budget is spent, and print and write what was found.

    Args:
        plain: The config of the task.
        said: Keys of it that the user said, which are not tuned.
        words: ``tune.KEY=VALUE``.
        given: The same, by key, from Python.
        steps: Of the user's, for each run.
        callbacks: The same.

    Raises:
        ConfigError: If Optuna is not installed, or there is nothing to tune on or by.
        CheckpointError: If the folder holds a tuning of something else.
        KeyboardInterrupt: Once what was found so far is printed and written.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"fedraclora tune needs Optuna, which is not installed ({error}): "
            "pip install 'fedraclora[tune]'"
        ) from error
    asked = settings(words, given or {})
    typed = {word.removeprefix("tune.").partition("=")[0] for word in words} | {*(given or ())}
    named = section(plain, "output").get("dir")
    folder = Path(FOLDER) if named is None else user_path("output.dir", named)
    plain = settled_start(settled(plain))
    plain["output"] = {**section(plain, "output"), "dir": None}
    Space.of(plain, said, asked, typed)  # what is wrong with the words is said first
    share = held_out(task_from_plain(plain), asked)
    final = {"evaluate.split": "test", "data.validation": section(plain, "data")["validation"]}
    plain = laid_over(plain, {"evaluate.split": "validation", "data.validation": share})
    space = Space.of(plain, said, asked, typed)
    run = opened(space)
    task = run.built.task
    metric = asked.metric or task.measured[0]
    if metric not in task.measured:
        raise ConfigError(
            f"tune.metric is {metric!r}; one that the task measures is wanted: "
            f"{', '.join(task.measured)}"
        )
    higher = higher_is_better(metric, lower_of(task.info))
    make(folder)
    say = print if section(plain, "output").get("progress") else lambda _: None
    search = Search(space, asked, metric, higher, folder, final, say, steps, callbacks)
    samples = f"{len(task.validation or ())} validation samples"
    for title, text in assumed(search, samples, own=not share).items():
        say(f"{title + ':':<24}{text}")
    found = partial(outcome, search, clients=run.built.clients, has_test=len(task.test) > 0)
    try:
        alone = search.run()
    except KeyboardInterrupt as error:
        found(over=False)
        error.add_note("; the same command goes on")
        raise
    if not alone:
        say("another process still runs: the last one tests the winner")
    with search.turn():
        return found(over=alone)


def opened(space: Space) -> Assembled:
    """Put the task together, with the first method that goes with it.

    Raises:
        FedRacLoraError: If none does: what is wrong with the first.
    """
    wrong: list[Exception] = []
    for method in space.methods.values():
        try:
            config = from_plain({**space.plain, "method": method}, METHODS)
            bare = replace(config, pretrain=PretrainConfig())
            run = assemble_with(bare, None, engine_of=engine_of)
        except (ConfigError, ModelError) as error:
            wrong.append(error)
            continue
        run.close()
        return run
    raise wrong[0]


def held_out(config: TaskConfig, asked: TuneConfig) -> float:
    """Return which share of the training samples is held out to tune on; 0: the data have some.

    Raises:
        ConfigError: If none can be, so that nothing but the test samples would be left.
    """
    if config.evaluate.by_clients:
        raise ConfigError(
            f"evaluate.clients={config.evaluate.clients}: which samples clients hold out follows "
            "from the seed, so that tuning would train on test samples of other seeds: leave it "
            "out here (what is found runs with it)"
        )
    own, beside = parted("data", config.data)
    data = bind("data", DATASETS, own, clients=config.clients, seed=config.seed)()
    if data.validation is not None:
        return 0.0
    if not len(data.train):
        raise ConfigError(
            f"data={config.data['name']} has no validation split, and none can be held out, since "
            "clients bring all training samples: tune on data that the server has, such as the "
            "samples of a few clients as data=table or data=arrays"
        )
    return float(str(beside.get("validation") or asked.validation))


def assumed(search: Search, samples: str, *, own: bool) -> dict[str, str]:
    """Say what a tuning assumes."""
    config, direction = search.config, "more" if search.higher else "less"
    budget = {
        "runs": config.runs,
        "core-hours": config.core_hours,
        "MB both ways, of all clients": config.megabytes,
    }
    rungs = [round(share * search.rounds) or 1 for share in sorted(config.rungs)]
    share = "those of the data" if own else "held out of the training samples"
    return {
        "metric": f"{search.metric}, of which {direction} is better, and bytes both ways",
        "measured on": f"{samples}, {share}; the test samples are left for the end",
        "budget": ", ".join(f"{v:g} {key}" for key, v in budget.items() if v is not None),
        "rounds": f"{search.rounds}; at {', '.join(map(str, rungs)) or 'no'} all but the best "
        f"{config.keep:g} end",
        "seeds": f"{', '.join(map(str, config.seeds))}; tested on "
        f"{', '.join(map(str, config.test_seeds))}",
        **search.space.told(),
        "never": "; ".join(" ".join(line) for line in config.never) or "nothing",
        "kept in": f"{search.folder}",
    }


@reported
@in_order()
def main() -> int:
    """Tune what the words ask for."""
    words = sys.argv[1:]
    if {"-h", "--help"} & {*words}:
        print(__doc__)
        return 0
    own = [word for word in words if word.startswith("tune.")]
    rest = [word for word in words if word not in own]
    tune_task(composed(rest), {key_of(word) for word in rest if is_override(word)}, own)
    return 0
