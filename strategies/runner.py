"""Execute a run, in its folder or in memory, and write its summary and figures."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from typing_extensions import override

from fedraclora.binding import Plain, section
from fedraclora.config.build import PreparedTask
from fedraclora.config.builder import TaskBuilder
from fedraclora.config.run_config import RunConfig
from fedraclora.data.partition import spread_clients
from fedraclora.engines.base import add_up
from fedraclora.errors import DivergenceError
from fedraclora.evaluation.metrics import lower_of
from fedraclora.loggers import logging_to
from fedraclora.run.callback import Callback, RunStart
from fedraclora.run.digests import check_data, located
from fedraclora.run.folder import (
    amend,
    begin_folder,
    clear_folder,
    has_checkpoint,
    is_finished,
    locked_folder,
    new_folder,
    read_config,
    read_summary,
    resume_word,
    write_summary,
)
from fedraclora.run.found_rate import FoundRate
from fedraclora.run.initial import note_model
from fedraclora.run.ledger import known_mean, reached_round, read_ledger, round_seconds
from fedraclora.run.log import logged
from fedraclora.run.recorder import checkpoint_meta, read_clients, together
from fedraclora.run.stopped import forget_stop, note_stop
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.facts import facts_of, learning_facts, mean_floats
from fedraclora.strategies.rate_search import STEP, RisenLoss, find_rate, restart_rate, still_note
from fedraclora.strategies.result import RunResult
from fedraclora.strategies.server.callbacks import Stopping
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.strategies.weights import load_weights
from fedraclora.training.localconfig import AUTO
from fedraclora.tree import digest

log = logging.getLogger(__name__)

SHOWN = 1000  # most clients in partition.png, spread over the population


def finished(config: RunConfig, folder: Path) -> RunResult:
    """Read a run from its folder, with its summary if it has finished; no file is written.

    Args:
        config: Its settings, as they are stored.
        folder: The run folder.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    rows = read_ledger(folder / "ledger.jsonl")
    effective = partial(load_weights, folder, own=config.plain)
    by_clients = partial(read_clients, folder)
    summary = read_summary(folder) if is_finished(folder) else {}
    return RunResult(
        summary, rows, folder, config, effective, StoredTask(config, folder), by_clients
    )


class StoredTask(TaskBuilder):
    """Build the task of a run from its folder, without pretraining."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        found = located(folder, config.data.group)  # the reader may work in another folder
        super().__init__(replace(config, data=replace(config.data, group=found)), pretrain=False)
        self.folder = folder

    @cached_property
    @override
    def built(self) -> PreparedTask:
        check_data(self.folder, self.config.data.group)  # other data could have other scales
        built = super().built
        note_model(self.config.model.group, built.task.model)
        return built


def execute(run: RunBuilder, *watching: Callback) -> RunResult:
    """Execute a run, write its files, and return the finished run.

    Args:
        run: The run, with no part built yet. Its folder is removed if the run cannot begin.
        watching: Callbacks before the run's own.

    Returns:
        The run, its engine ended.

    Raises:
        FedRacLoraError: If config, data, folder or clients are wrong.
    """
    began = time.perf_counter()
    folder, resume = run.folder, run.resume
    plain = run.config.plain  # as callbacks are given it
    run.watching = (logging_to(run.config.output.loggers), *watching, *run.watching)
    with ExitStack() as lock:  # held until the summary is there: a run in between looks stopped
        if folder is not None:
            held = locked_folder if resume else new_folder
            lock.enter_context(held(folder, shared=run.config.output.shared))
        before = run_to_end(run, plain, resumes=resume)
        summary = summarize(run, before + time.perf_counter() - began)
        if folder is not None:
            if run.config.output.plots:
                draw(run, folder)
            write_summary(folder, summary)
    run.strategy.callbacks.end(summary)
    rows = list(run.recorder.ledger.rows)
    columns = together(run.recorder.by_clients)
    return RunResult(summary, rows, folder, run.config, run.weights, run, lambda: columns)


def run_to_end(run: RunBuilder, plain: Plain, *, resumes: bool) -> float:
    """Run all rounds, anew at a lower rate if they diverge; its engine is ended after.

    Args:
        run: The run, whose folder is locked.
        plain: Its config, as callbacks are given it.
        resumes: Whether it continues an existing run.

    Returns:
        The seconds that it took before it was resumed.
    """
    reached, folder = 0, run.folder
    with ExitStack() as stack:
        stack.enter_context(logged(folder))
        if resumes and folder is not None:
            stored = section(read_config(folder), "output")
            check_data(folder, run.config.data.group)
            reached = reached_round(folder)
            run.resume = has_checkpoint(folder, int(str(stored["checkpoint_every"])))
        run.config = with_rate(run)
        stack.callback(run.close)
        steps = copy.deepcopy([*run.given_steps]) if restart_rate(run) else ()
        while True:
            try:
                return run_rounds(run, plain, reached, resumes=resumes)
            except DivergenceError:
                if (lower := restart_rate(run)) is None:
                    raise
                restart(run, lower, copy.deepcopy(steps))


def run_rounds(run: RunBuilder, plain: Plain, reached: int, *, resumes: bool) -> float:
    """Build a run and run its rounds, in its folder if it has one.

    Args:
        run: The run, whose learning rate is known.
        plain: Its config for callbacks.
        reached: The last round of its folder's ledger.
        resumes: Whether it goes on in its folder.

    Returns:
        The seconds of the rounds that a resumed run had already.

    Raises:
        FedRacLoraError: If config, data or clients are wrong.
    """
    config, folder = run.config, run.folder
    run.ready()
    if folder is not None:
        if resumes:
            run.recorder.incidents += amend(folder, config.plain)
        else:
            begin_folder(folder, config.plain, run.found)
    if (done := run.strategy.done) < reached:
        again = f"resumed after round {done}: rounds {done + 1} to {reached} were run again"
        run.recorder.incidents.append(f"the run {again}")
    before = math.fsum(map(round_seconds, run.recorder.ledger.rows))
    with stopping_noted(run, folder):
        begin = RunStart(config.title, plain, folder, done, facts_of(run))
        run.strategy.callbacks.begin(begin)
        if restart_rate(run):
            run.strategy.callbacks.list.append(RisenLoss())
        run.start()
    return before


def restart(run: RunBuilder, lower: FoundRate, steps: Sequence[RoundStep]) -> None:
    """Prepare a run that has diverged to begin anew at a lower learning rate.

    Args:
        run: The run.
        lower: The rate, with those at which the run diverged.
        steps: The program's own round steps, as new.
    """
    log.warning(
        "training diverged in round %d at learning rate %g: the run begins anew at %g",
        *(run.strategy.done + 1, lower.diverged[-1], lower.rate),
    )
    if run.folder is not None:
        clear_folder(run.folder)
    run.found = lower
    run.begin_anew(run.config.at_rate(lower.rate), steps)


def with_rate(run: RunBuilder) -> RunConfig:
    """Return the config of a run with a number for ``local.lr=auto``.

    Of a run that goes on it is the one in its folder.
    """
    if run.config.local.lr != AUTO:
        return run.config
    if run.folder is not None and run.resume:
        kept = section(read_config(run.folder), "local")["lr"]
        run.found = FoundRate(float(str(kept)), "kept")
    else:
        run.found = find_rate(run)
    return run.config.at_rate(run.found.rate)


@contextmanager
def stopping_noted(run: RunBuilder, folder: Path | None) -> Iterator[None]:
    """Report to callbacks that a run stopped before its end, if it does.

    The reason and the curves are written into the folder.
    """
    if folder is not None:
        forget_stop(folder)
    try:
        yield
    except BaseException as error:
        try:
            if folder is not None and run.recorder.ledger.rows:
                keep_stop(run, folder, error)
        finally:
            run.strategy.callbacks.end({}, failed=True)  # they may read why
        raise


def keep_stop(run: RunBuilder, folder: Path, error: BaseException) -> None:
    """Write into a run's folder why it stopped, with its curves; what fails is a warning."""
    try:
        note_stop(folder, run.strategy.done, error)
        if isinstance(error, DivergenceError) and not run.config.local.is_own:
            error.add_note(recovery_hint(run, folder))
        if run.config.output.plots:
            draw(run, folder)
    except Exception as second:  # must not hide the first error
        log.warning("cannot write in %s why the run stopped: %r", folder, second)


def recovery_hint(run: RunBuilder, folder: Path) -> str:
    """Write where a diverged run stopped, and how to resume it from its last good round."""
    rate = float(f"{run.config.local.step_size / STEP:.2g}")
    kept = checkpoint_meta(folder).get("round")
    good = kept is not None and not run.recorder.is_spoilt(int(str(kept)))
    where, attack = f"in round {run.strategy.done + 1}", run.config.attack
    if attack.share and not run.config.aggregator.individuals:
        where += (
            f": aggregator={run.config.aggregator.name} does not limit attack={attack.name}. Use a "
            "robust aggregator (aggregator=geometric_median)"
        )
    if not good:
        return f"{where}. No checkpoint is sound: run it anew with local.lr={rate:g}"
    command = "deploy" if run.engine.elsewhere else "simulate"
    return (
        f"{where}. Resume from round {kept} with a lower rate: "
        f"fedraclora {command} {resume_word(folder)} local.lr={rate:g}"
    )


def summarize(run: RunBuilder, seconds: float) -> dict[str, object]:
    """Collect the final figures of a run.

    Args:
        run: The finished run.
        seconds: Its duration: this process, and the rounds of earlier processes.
    """
    strategy, ledger = run.strategy, run.recorder.ledger
    measured = [r for r in ledger.rows if r.get("metrics")]
    up, down = mean_floats(run, strategy.done)
    more: dict[str, object] = {}
    if "virtual_seconds" in ledger.rows[-1]:
        more["virtual_seconds"] = ledger.rows[-1]["virtual_seconds"]
    dropped = [d for row in ledger.rows if isinstance(d := row.get("dropped"), list)]
    if dropped:
        more["dropped"] = sum(len(refusals) for refusals in dropped)
        more["asked"] = sum(int(str(row.get("asked", 0))) for row in ledger.rows)
    transport: dict[str, dict[str, int]] = {}
    for row in ledger.rows:
        if isinstance(nodes := row.get("transport"), dict):
            add_up(transport, nodes)
    more |= {"transport": transport} if transport else {}
    if run.engine.elsewhere and (missed := Counter(of_failures(ledger.rows))):
        more["missed"] = {str(client): missed[client] for client in sorted(missed)}
    stopping = Stopping(run.config.stop, lower=lower_of(run.built.task.info))
    if (best := stopping.best(ledger.rows)) is not None:
        keys = ("round", "validation", "metrics", "clients")
        more["best"] = {key: best[key] for key in keys if key in best}
    if best is not None or strategy.callbacks.ended:
        more["stopped"] = strategy.done < run.config.rounds
    more |= {"unmoved": note} if (note := still_note(run)) else {}
    # The error of quantized numbers, relative to the unquantized ones.
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
        "begins": learning_facts(run),
        "task": run.built.task.info,
        "seconds": round(seconds, 3),
    }


def of_failures(rows: Iterable[Mapping[str, Any]]) -> Iterator[int]:
    """Yield each client that a round went on without, once for each such round."""
    for row in rows:
        yield from {int(failure["client"]) for failure in row.get("failures") or ()}


def draw(run: RunBuilder, folder: Path) -> None:
    """Draw the curves and, for a task with classes, the labels of up to `SHOWN` clients."""
    from fedraclora.plots.run import label_distribution, run_curves

    rows, config = run.recorder.ledger.rows, run.config
    run_curves(rows, folder / "curves.png", config.title, planned=config.rounds)
    if run.built.classes:
        counts = run.built.label_counts(spread_clients(run.built.clients, SHOWN))
        label_distribution(counts, folder / "partition.png", population=run.built.clients)
