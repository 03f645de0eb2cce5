"""Carries a run out, in its folder or in memory, and closes it: summary and figures."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from typing_extensions import override

from fedraclora.binding import section
from fedraclora.config.build import BuiltTask, measured_samples
from fedraclora.config.builder import TaskBuilder
from fedraclora.config.run_config import RunConfig
from fedraclora.data.partition import spread_clients
from fedraclora.evaluation.choices import Questions
from fedraclora.evaluation.clients import scored
from fedraclora.evaluation.metrics import Measure, lower_of
from fedraclora.loggers import logging_to
from fedraclora.protocol.method import Method, Plan
from fedraclora.protocol.plan import frozen_layers, some_of, thawed
from fedraclora.run.callback import Begin, Callback, run_title
from fedraclora.run.digests import check_data, located
from fedraclora.run.folder import (
    alone,
    amend,
    begin_folder,
    has_checkpoint,
    is_finished,
    new_folder,
    read_config,
    read_summary,
    write_summary,
)
from fedraclora.run.ledger import known_mean, reached_round, read_ledger, round_seconds
from fedraclora.run.recorder import read_clients, together
from fedraclora.run.stopped import forget_stop, note_stop
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.result import RunResult
from fedraclora.strategies.server.callbacks import Stopping
from fedraclora.strategies.weights import load_weights
from fedraclora.tree import digest

log = logging.getLogger(__name__)

SHOWN = 1000  # clients in partition.png, spread over the population
NAMED = 8  # notes of a run that begins
UNMEASURED = "none: the server has no test samples (data.test_file), so that nobody measures"
OR_CLIENTS = " (evaluate.clients=round: clients do, on samples of their own)"
TITLE = 13  # characters, so that what follows stands in one column


def finished(config: RunConfig, folder: Path) -> RunResult:
    """Read a run from its folder, with its summary if it has come to its end; nothing is written.

    Args:
        config: Its settings, as they are stored.
        folder: The run folder.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    rows = read_ledger(folder / "ledger.jsonl")
    effective = partial(load_weights, folder, own=config.plain)
    summary = read_summary(folder) if is_finished(folder) else {}
    by_clients, plain = partial(read_clients, folder), dict(config.plain)
    return RunResult(
        summary, rows, folder, plain, effective, StoredTask(config, folder), by_clients
    )


class StoredTask(TaskBuilder):
    """Builds the task of a run from its folder, whose weights need no pretraining."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        found = located(folder, config.data)  # who asks may work in another folder
        super().__init__(replace(config, data=found), pretrain=False)
        self.folder = folder

    @cached_property
    @override
    def built(self) -> BuiltTask:
        check_data(self.folder, self.config.data)  # of other data other scales could come
        return super().built


def execute(run: RunBuilder, *watching: Callback) -> RunResult:
    """Run to the end and write everything that a run leaves behind.

    Args:
        run: Of which nothing is built yet. Its folder is taken away again where the run cannot
            begin.
        watching: What watches the rounds, or ends them early, before the run's own callbacks.

    Returns:
        The run, its engine ended.

    Raises:
        FedRacLoraError: Whatever is wrong with the config, the data, the folder or the clients.
    """
    began = time.perf_counter()
    config, folder, resume = run.config, run.folder, run.resume
    run.watching = (logging_to(config.output.loggers), *watching, *run.watching)
    with ExitStack() as stack:
        reached = 0
        if folder is not None:
            held = alone if resume else new_folder
            stack.enter_context(held(folder, shared=config.output.shared))
        if resume and folder is not None:
            stored = section(read_config(folder), "output")
            check_data(folder, config.data)
            reached = reached_round(folder)
            run.resume = has_checkpoint(folder, int(str(stored["checkpoint_every"])))
        run.ready()
        stack.callback(run.close)
        if folder is not None:
            if resume:
                run.recorder.incidents += amend(folder, config.plain)
            else:
                begin_folder(folder, config.plain)
        if (done := run.strategy.done) < reached:
            again = f"went on after round {done}: rounds {done + 1} to {reached} were run again"
            run.recorder.incidents.append(f"the run {again}")
        before = math.fsum(map(round_seconds, run.recorder.ledger.rows))
        stack.enter_context(stopping_noted(run, folder))
        title = run_title(config.plain)
        said = opening_lines(run), notes_of(run)
        run.strategy.callbacks.begin(Begin(title, config.plain, folder, done, *said))
        run.start()
    summary = summarise(run, before + time.perf_counter() - began)
    if folder is not None:
        if config.output.plots:
            draw(run, folder)
        write_summary(folder, summary)
    run.strategy.callbacks.end(summary)
    rows = list(run.recorder.ledger.rows)
    columns, plain = together(run.recorder.by_clients), dict(config.plain)
    return RunResult(summary, rows, folder, plain, run.weights, run, lambda: columns)


@contextmanager
def stopping_noted(run: RunBuilder, folder: Path | None) -> Iterator[None]:
    """Tell those who watch a run that it stopped before its end, if it does.

    Its reason and its curves are written into the folder.
    """
    if folder is not None:
        forget_stop(folder)
    try:
        yield
    except BaseException as error:
        run.strategy.callbacks.end({}, failed=True)
        if folder is None or not run.recorder.ledger.rows:
            raise
        try:
            note_stop(folder, run.strategy.done, error)
            if run.config.output.plots:
                draw(run, folder)
        except Exception as second:  # must not hide the first
            log.warning("the end of the run could not be noted in %s: %r", folder, second)
        raise


def summarise(run: RunBuilder, seconds: float) -> dict[str, object]:
    """Collect the final figures of a run.

    Args:
        run: At its end.
        seconds: What it took: this process, and the rounds of those before it.
    """
    strategy, ledger = run.strategy, run.recorder.ledger
    measured = [r for r in ledger.rows if r.get("metrics")]
    method, state = strategy.method.in_force(strategy.state)
    up, down = mean_floats(method, state.plan, strategy.done)
    more: dict[str, object] = {}
    if "virtual_seconds" in ledger.rows[-1]:
        more["virtual_seconds"] = ledger.rows[-1]["virtual_seconds"]
    dropped = [d for row in ledger.rows if isinstance(d := row.get("dropped"), list)]
    if dropped:
        more["dropped"] = sum(len(refusals) for refusals in dropped)
        more["asked"] = sum(int(str(row.get("asked", 0))) for row in ledger.rows)
    stopping = Stopping(run.config.stop, lower=lower_of(run.built.task.info))
    if (best := stopping.best(ledger.rows)) is not None:
        keys = ("round", "validation", "metrics", "clients")
        more["best"] = {key: best[key] for key in keys if key in best}
    if best is not None or strategy.callbacks.ended:
        more["stopped"] = strategy.done < run.config.rounds
    # What numbers in fewer bits are off by, relative to what was rounded.
    errors = {key: known_mean(ledger.rows, key) for key in ("rounding_up", "rounding_down")}
    more |= {key: error for key, error in errors.items() if math.isfinite(error)}
    more |= strategy.steps.summary(ledger.rows[-1])
    by_clients = [row["clients"] for row in ledger.rows if "clients" in row]
    more |= {"by_clients": by_clients[-1]} if by_clients else {}
    return {
        "rounds": strategy.done,
        "metrics": measured[-1]["metrics"] if measured else {},
        "weights_digest": digest(run.weights()),
        "ledger_digest": ledger.digest(),
        "uplink_floats": up,
        "downlink_floats": down,
        "uplink_total": ledger.rows[-1]["uplink_total"],
        "downlink_total": ledger.rows[-1]["downlink_total"],
        "catchup_total": sum(int(str(row.get("catchup_bytes", 0))) for row in ledger.rows),
        **more,
        "clients": run.built.clients,
        "cohort": run.built.cohort,
        "chunk": run.chunk.chunk,
        "chunk_plan": run.chunk.record(),
        "device": run.built.device.type,
        "begins": introduction(run),
        "task": run.built.task.info,
        "seconds": round(seconds, 3),
    }


def draw(run: RunBuilder, folder: Path) -> None:
    """Draw the curves and, for a task with classes, the labels of up to `SHOWN` clients."""
    from fedraclora.plots.run import label_distribution, run_curves

    rows, plain = run.recorder.ledger.rows, run.config.plain
    run_curves(rows, folder / "curves.png", run_title(plain), planned=run.config.rounds)
    if run.built.classes:
        counts = run.built.label_counts(spread_clients(run.built.clients, SHOWN))
        label_distribution(counts, folder / "partition.png", population=run.built.clients)


def mean_floats(method: Method, plan: Plan, rounds: int) -> tuple[float, float]:
    """Count the numbers that a client sends and is sent in a round, the mean over the rounds.

    They differ from round to round where a first round begins from seeds, or factors take turns.
    """
    each = [method.floats(plan, round_) for round_ in range(1, max(1, rounds) + 1)]
    means = [sum(numbers) / len(each) for numbers in zip(*each, strict=True)]
    up, down = (int(mean) if mean == int(mean) else round(mean, 1) for mean in means)
    return up, down


def opening_lines(run: RunBuilder) -> list[str]:
    """Say what a run begins with, beside `notes_of`."""
    config, model, lines = run.config, run.built.task.model, dict(introduction(run))
    told = run.built.task.info
    lines |= samples_of(run)
    known = ("texts", "inputs", "weights", "precision", "new_head")
    lines |= {n.replace("_", " "): str(told[n]) for n in known if n in told}
    if config.own_model and (frozen := frozen_layers(model, run.plan)):
        lines["not trained"] = (
            f"{some_of(frozen, 'layer')} (target_modules=all adds convolutions, "
            "target_modules=[NAME] adapts an "
            "embedding, modules_to_save=[NAME] trains a layer in full)"
        )
    if epochs := config.pretrain.epochs:
        of = config.pretrain.labels
        classes = "" if of is None else f" on the classes {', '.join(map(str, of))}"
        lines["pretrained"] = (
            f"all weights, {epochs} epochs in one place{classes}, before the clients begin "
            "(pretrain=none leaves it out)"
        )
    lines |= {"steps": ", ".join(map(str, config.steps))} if config.steps else {}
    if config.local.is_own and config.aggregation_weights == "samples":
        lines["weights"] = (
            "the samples that your function says to round.read (or aggregation_weights=uniform)"
        )
    lines |= measured_by(run)
    if run.built.task.choices is not None:
        samples = measured_samples(run.built.task, config.evaluate.split)
        lines["choices"] = Questions.of(run.built.task, samples).told
    if config.evaluate.split != "test":
        later = " (fedraclora evaluate RUN)" if len(run.built.task.test) else ""
        lines["measured on"] = f"validation samples: the test is left for the end{later}"
    lines |= {"chunk": str(run.chunk), **run.grid.told, **idle_workers(run)}
    return [f"{title + ':':<{TITLE}}{text}" for title, text in lines.items()]


def samples_of(run: RunBuilder) -> dict[str, str]:
    """Say how many samples are trained and tested on; nothing where clients hold them unseen."""
    told = run.built.task.info
    if "train" not in told:
        return {}
    text = f"{told['train']:,} training samples of {run.built.clients:,} clients"
    text += f", {told['test']:,} test samples"
    if share := told.get("held_out"):
        text += f" ({share:g} of all, held out by a seed)"
    for title, key in (("features", "features"), ("left out", "columns_left_out")):
        if isinstance(names := told.get(key), list):
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            text += f"; {title} {', '.join(map(str, names[:NAMED]))}{more}"
    return {"data": text}


def idle_workers(run: RunBuilder) -> dict[str, str]:
    """Say that a round has fewer chunks than there are workers, where smaller ones would help."""
    cohort, workers = run.built.cohort, run.grid.workers
    chunks, smaller = -(-cohort // run.chunk.chunk), -(-cohort // workers)
    if chunks >= workers or smaller >= run.chunk.chunk:
        return {}
    text = f"{workers - chunks} of {workers} workers, as {cohort} clients a round are {chunks} "
    text += f"chunk{'s' * (chunks > 1)}; engine.chunk={smaller} gives work to more, with other"
    return {"idle": f"{text} last bits"}


def measured_by(run: RunBuilder) -> dict[str, str]:
    """Say which clients measure on what; nothing where none does."""
    config, held, asked = run.config, run.built.task.held, run.config.evaluate
    own = run.built.task.info.get("tests_of_clients", 0)
    if held is None:
        idle = f"no client: set evaluate.clients=all to use the test samples that {own} bring"
        return {"measured by": idle} if own else {}
    who = "the cohort" if asked.clients == "round" else "all clients"
    text = f"{who}, each on {asked.portion:g} of its samples, which nobody trains on"
    if own and asked.source["own_tests"]:
        text = (
            f"{who}, {own} on test samples of their own, others{text.removeprefix(f'{who}, each')}"
        )
    if config.veiled:  # nobody learns who holds nothing out, nor how many do
        text += f"; nothing is released of fewer than {asked.min_clients} (evaluate.min_clients)"
    elif held.data.table is not None:  # others are made or read when they are asked
        sizes = held.data.sizes(torch.arange(run.built.clients))
        small = torch.nonzero(sizes == 0).flatten()
        text += f": {int(sizes.sum())} in all"
        if len(small):
            some = ", ".join(map(str, small[:NAMED].tolist())) + (
                "..." if small[NAMED:].any() else ""
            )
            text += f"; {len(small)} of {run.built.clients} have too few to hold any out ({some})"
    if unknown := ", ".join(scored(Measure.of_task(run.built.task))):
        text += f"; no value over all samples of {unknown}, which need every output"
    return {"measured by": text}


def introduction(run: RunBuilder) -> dict[str, str]:
    """Name loss, metrics, optimiser and what is trained, by title: for the summary, too."""
    task = run.built.task
    known = len(measured_samples(task, run.config.evaluate.split))
    wide = math.prod(task.test.target.shape[1:]) if task.loss == "squared_error" else 1
    hint = "" if task.train.opaque else OR_CLIENTS
    return {
        "loss": f"{task.loss.partition('@')[0]} ({task.info['loss_from']})"
        + (f", summed over the {wide} numbers of a target" if wide > 1 else "")
        + (f", its outputs read as those of {task.like}" if task.like else ""),
        "metrics": ", ".join(task.measured) if known or task.held else UNMEASURED + hint,
        "optimiser": optimiser_of(run.config),
        "trained": run.trained,
    }


def notes_of(run: RunBuilder) -> list[str]:
    """Say what is not as it was asked for, such as a rank that was cut, where a run begins."""
    notes = [] if run.recorder.ledger.rows else list(run.strategy.state.notes)
    if more := notes[NAMED:]:
        notes = [*notes[:NAMED], f"{len(more)} more such notes are in the ledger"]
    if run.config.own_model and (names := thawed(run.built.task.model, run.plan)):
        notes.append(
            f"requires_grad=False of {some_of(names, 'parameter')} is not read: these are trained "
            "or adapted, as targets, head and dense say (target_modules=[NAME] adapts that layer "
            "alone, "
            "head=frozen)"
        )
    warning = run.built.task.info.get("loss_warning")
    duplicates = run.built.task.info.get("duplicates")
    told = [*duplicates.values()] if isinstance(duplicates, dict) else []
    told += similar if isinstance(similar := run.built.task.info.get("similar_names"), list) else []
    return [*([str(warning)] if warning else []), *told, *notes]


def optimiser_of(config: RunConfig) -> str:
    """Say how clients take their steps, and what the server makes of their mean."""
    local, server = config.local, config.server_optimiser
    steps = local.epochs if local.steps is None else local.steps
    unit = ("epoch" if local.steps is None else "step") + ("s" if steps != 1 else "")
    size = f"batches of {local.batch_size}" if local.batch_size else "one batch"
    at_server = [f"{server.name} at the server"] if server.name != "none" else []
    if local.train is not None:
        name = local.train.partition("@")[0]
        said = f"that of your own training function {name} (local.train), as its loss and steps are"
        return ", ".join([said, *at_server])
    parts = [local.optimiser, f"learning rate {local.lr:g}"]
    parts += [f"{local.full_lr:g} beside adapters"] if local.full_lr is not None else []
    parts += [f"momentum {local.momentum:g}"] if local.momentum else []
    parts += [f"weight decay {local.weight_decay:g}"] if local.weight_decay else []
    parts += [f"schedule {local.schedule}"] if local.schedule != "constant" else []
    most = getattr(config.method, "steps", None)  # of which one number each is sent
    bound = f", {most} steps at most (method.steps)" if most else ""
    parts += [f"{steps} {unit} of {size}{bound}", *(extra.setting for extra in local.added)]
    return ", ".join([*parts, *at_server])
