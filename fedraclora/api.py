"""Run federated learning from Python: ``import fedraclora; fedraclora.simulate(...)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fedraclora.binding import OWN_GROUPS, PlainDict, section
from fedraclora.compose.program_objects import register_all, trained_by
from fedraclora.compose.resume import is_done
from fedraclora.compose.values import config_of, is_whole
from fedraclora.config.build import resolved
from fedraclora.config.run_config import from_plain
from fedraclora.config.settings import OutputConfig
from fedraclora.data.locate import user_path
from fedraclora.errors import CheckpointError, ConfigError, of_system
from fedraclora.evaluation.own_metrics import Metric
from fedraclora.imports import refuse_run
from fedraclora.launch import choose, measuring_run, run_shown
from fedraclora.run.callback import Callback
from fedraclora.run.folder import has_begun
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.result import RunResult
from fedraclora.strategies.runner import finished
from fedraclora.strategies.server.callbacks import each_of, own_callbacks
from fedraclora.strategies.server.round_step import RoundStep, described, own_steps
from fedraclora.strategies.start import resolved_start
from fedraclora.trust import trust as trust_all
from fedraclora.tuning.result import TuningResult
from fedraclora.tuning.task import tune_task

__all__ = [
    "Callback",
    "Metric",
    "RoundStep",
    "RunResult",
    "TuningResult",
    "read_run",
    "simulate",
    "tune",
]


def simulate(
    *choices: str | Mapping[str, object],
    model: nn.Module | str | Mapping[str, object] | None = None,
    data: object = None,
    method: object = None,
    partition: object = None,
    test: object = None,
    train: Callable[..., object] | str | None = None,
    client: str | None = None,
    target: str | None = None,
    loss: object = None,
    metrics: object = None,
    folder: str | Path | None = None,
    resume: bool = False,
    steps: object = (),
    callbacks: object = (),
    on_round: object = (),
    trust: Sequence[str] = (),
    **keys: object,
) -> RunResult:
    """Run federated learning on a task in this process, to its end.

    Other settings have their defaults, so that the same arguments give the same bits as
    ``fedraclora simulate``. The config also chooses the engine: ``engine=vectorized`` (many clients
    as one batch), ``inline`` or ``ray``. Model, data and method may be objects of the program.

    Args:
        choices: Arguments of the command line (``"rounds=5"``, ``"local.lr=0.1"``), or equivalent
            nested mappings (``{"rounds": 5, "local": {"lr": 0.1}}``; in a group ``name`` chooses
            its file). A mapping with every key of the config, such as `RunResult.config`, must be
            the only one: it is used unchanged, except ``resume`` and ``output.dir``, which belong
            to its run, and ``keys`` override it.
        model: A `torch.nn.Module`, also of Hugging Face; it is copied, and its weights are the
            initial weights. The last layer is the head, unless you set ``"model.head=[name]"``. Or
            the name of a choice, or a mapping of its keys.
        data: The samples of the clients: a list with one entry per client. An entry is ``(inputs,
            target)`` (arrays or tensors; inputs may be a dict by the names of the model's
            arguments), a map-style `torch.utils.data.Dataset`, or ``{"train": ..., "test": ...}``
            of these, where the client measures on ``test`` (``evaluate.clients``). Or one entry,
            which ``partition`` and ``clients`` divide; a Hugging Face ``Dataset``; a pandas frame
            or the path of a table (``.csv``, ``.tsv``, ``.parquet``). Or the name of a choice, or a
            mapping of its keys.
        method: An instance of a method's class (``FedRacLora(rank=8)``), also of your own class; or
            the name of a choice, or a mapping of its keys.
        partition: A partitioner of flwr-datasets for a Hugging Face ``Dataset``; or the name of a
            choice, or a mapping of its keys.
        test: With data from the program: samples to measure on, in any form of an entry; or the
            share of each client's samples to hold out (0: the server has none, and measures
            nothing); None: a fifth.
        train: Your own training: a function that is called for each client and round with a
            `fedraclora.client.Round`, and returns the result of its ``read``; or
            ``"module:function"``. None: the project's own loop (``local``).
        client: The column of a table that names the client.
        target: The column of a table to predict; None: ``label``, ``labels`` or ``target``.
        loss: Your own: ``loss(output, target)``, a function or a module, that returns one loss per
            sample, [N]; or its ``"module:function"``. Or, with data from the program,
            ``cross_entropy``, ``squared_error``, ``logistic``, ``multi_label``, ``token_classes``,
            ``pixel_classes`` or ``next_token``; None: chosen by the model or the targets, and an
            error if these are ambiguous.
        metrics: A list of names, of metrics of torchmetrics, and of your own
            (`fedraclora.Metric`), the primary one first; None: those usual for the loss.
        folder: The folder for the run's files, like ``output.dir``; None with ``output.dir=null``:
            the run stays in memory and writes no files.
        resume: Resume the run in the folder; if there is none, start it. A finished run is read,
            not run again.
        steps: Additional steps of a round, between clients and method: a list of
            `fedraclora.RoundStep`. An exception in one stops the run, which can be resumed.
        callbacks: Callbacks that watch the run, or end it early: a list of `fedraclora.Callback`. A
            function in the list is called with a copy of each new row of the history, a dict (see
            `RunResult.rows`), and returns None. An exception in one stops the run, which can be
            resumed.
        on_round: The older name of ``callbacks``.
        trust: Modules whose code may run although it is installed, or named in a file of others
            (docs/security.md), for the rest of this process. Names in the arguments are trusted.
        keys: Further choices: a value (``rounds=5``), the name of a choice (``local="momentum"``),
            or a mapping of a group's keys (``local={"lr": 0.1}``).

    Returns:
        The run: ``history`` (a pandas frame, one row a round), ``model()``, ``weights()``,
        ``evaluate(data)``, ``plot()``, ``save(folder)``, ``summary``, ``rows``, ``folder``,
        ``config``.

    Raises:
        ConfigError: If a key, a choice or a value is wrong, or the parts do not go together: the
            same error as on the command line.
        DataError: If samples are invalid, naming the client.
        CheckpointError: If the folder holds a run already, or one of another config.
        FedRacLoraError: If the run fails; ClientError if clients fail.

    Note:
        As in every run, torch is set to ``engine.threads`` threads in this process.

    Example:
        >>> import fedraclora, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> clients = [(part, (part[:, 0] > 0).long()) for part in x.split(20)]
        >>> run = fedraclora.simulate(
        ...     "output.progress=false", model=net, data=clients, method="ffa_lora", rounds=2
        ... )
        >>> list(run.history.index), sorted(run.history.columns)[:2], run.evaluate() != {}
        ([0, 1, 2], ['accuracy', 'catchup_bytes'], True)
        >>> tuple(run.model()(x).shape)
        (60, 2)
    """
    refuse_run()
    if not isinstance(resume, bool):
        raise ConfigError(f"resume={resume!r}: give True or False, and the folder as folder=...")
    trust_all(trust)
    said: dict[str, object] = {
        "model": model,
        "data": data,
        "method": method,
        "partition": partition,
        "test": test,
        "train": train,
        "client": client,
        "target": target,
        "loss": loss,
        "metrics": metrics,
        "steps": steps,
        "callbacks": callbacks,
        "on_round": on_round,
    }
    return run_asked(asked_of(choices, said | keys), folder, resume=resume)


def run_asked(
    asked: SimulateArguments, folder: str | Path | None, *, resume: bool, brief: bool = False
) -> RunResult:
    """Run what the arguments of `simulate` ask for.

    Args:
        asked: Of `asked_of`.
        folder: As for `simulate`.
        resume: As for `simulate`.
        brief: Whether the terminal shows a bar alone, and the log of the run the rest.

    Raises:
        FedRacLoraError: As `simulate`.
    """
    plain, typed, watching, given = asked
    output = section(plain, "output")
    place = place_of(plain, output, folder)
    if place is None:
        if resume:
            raise ConfigError("resume=True needs the folder of the run: give folder=... too")
        reads = {f"output.{key}" for key in OutputConfig.in_memory}
        idle = [k for k in typed if k.startswith("output.") and k not in reads]
        if idle:
            raise ConfigError(
                f"{', '.join(idle)}: a run in memory writes nothing. Give folder=... too, or "
                "leave it out."
            )
        plain = resolved_start(resolved(plain))
        run = RunBuilder(from_plain(plain, METHODS), callbacks=watching, steps=given)
        return run_shown(run, brief=brief)
    wanted = {
        **plain,
        "output": {**output, "dir": str(place)},
        "resume": "auto" if resume else None,
    }
    with usable(place):
        if not resume and has_begun(place):
            raise CheckpointError(
                f"{place} holds a run already. Give resume=True to resume it with its own config "
                "(run.config, or config.yaml in the folder, with rounds=... on top), or name "
                "another folder."
            )
        found, place, goes_on = choose(wanted, typed, None)
        config = from_plain(found, METHODS, resuming=goes_on)
        if goes_on and is_done(place, found):
            return finished(config, place)
        run = RunBuilder(config, place, resume=goes_on, callbacks=watching, steps=given)
        return run_shown(run, brief=brief)


def tune(
    *choices: str | Mapping[str, object],
    tune: Mapping[str, object] | None = None,
    folder: str | Path | None = None,
    trust: Sequence[str] = (),
    **given: Any,
) -> TuningResult:
    """Find the Pareto-optimal settings of a task in metric and bytes.

    Args:
        choices: As for `simulate`, and ``"tune.KEY=VALUE"`` (``fedraclora tune``). Settings given
            for the run are not tuned.
        tune: Keys of ``conf/tune.yaml``, such as ``{"runs": 20, "lr": [1e-3, 1]}``.
        folder: The folder of all runs; the same call with the same objects resumes. None:
            ``runs/tune``.
        trust: As for `simulate`.
        given: Model, data and further arguments of `simulate`.

    Returns:
        ``frontier`` (a pandas frame), ``configs`` (arguments of `simulate`, by MB per client),
        ``test``, ``folder``.

    Raises:
        FedRacLoraError: As `simulate`; ConfigError if Optuna is not installed
            (``pip install -e '.[tune]'``), or the task has only test samples to tune on.
    """
    refuse_run()
    trust_all(trust)
    if [c for c in choices if isinstance(c, Mapping) and is_whole(c)]:
        raise ConfigError("a whole config leaves nothing to tune: give tune only some keys")
    own = [c for c in choices if isinstance(c, str) and c.startswith("tune.")]
    rest = [c for c in choices if c not in own]
    plain, typed, watching, steps = asked_of((*rest,), given)
    output = section(plain, "output")
    place = place_of(plain, output, folder)
    plain["output"] = {**output, "dir": None if place is None else str(place)}
    said = {*typed}
    for group in OWN_GROUPS:
        # an object already has all its keys
        if not isinstance(given.get(group), str | Mapping | None):
            said |= {group, *(f"{group}.{key}" for key in section(plain, group))}
    return tune_task(plain, said, own, tune, steps=steps, callbacks=watching)


JUDGES = ("loss", "metrics")


class SimulateArguments(NamedTuple):
    """Hold the parsed arguments of `simulate`: config, typed keys, callbacks and steps."""

    plain: PlainDict
    typed: list[str]
    watching: list[Callback]
    steps: list[RoundStep]


def asked_of(
    choices: tuple[str | Mapping[str, object], ...], given: Mapping[str, Any]
) -> SimulateArguments:
    """Compose the config from arguments of `simulate`, and register its objects."""
    keys = dict(given)
    model, data, train = (keys.pop(name, None) for name in ("model", "data", "train"))
    steps, callbacks, on_round = (keys.pop(name, ()) for name in ("steps", "callbacks", "on_round"))
    beside = {name: keys.pop(name, None) for name in ("test", "client", "target", *JUDGES)}
    whole = len(choices) == 1 and isinstance(choices[0], Mapping) and is_whole(choices[0])
    groups = {group: keys.pop(group, None) for group in OWN_GROUPS}
    objects = register_all(model, data, groups, beside, whole=whole, own=train is not None)
    if train is not None:
        objects.words.append("local=own")
    plain, typed = config_of(choices if whole else (*objects.words, *choices), keys | objects.keys)
    plain = trained_by(train, objects.put_into(plain, typed))
    words = {"steps": [*each_of(steps)], "callbacks": [*each_of(callbacks)]}
    own, named = own_steps(steps), (str, Mapping)
    if words["steps"]:
        told = iter(map(described, own))
        plain["steps"] = [x if isinstance(x, named) else next(told) for x in words["steps"]]
    watching = [x for x in words["callbacks"] if not isinstance(x, named)]
    if len(watching) < len(words["callbacks"]):
        plain["callbacks"] = [x for x in words["callbacks"] if isinstance(x, named)]
    watching = [*own_callbacks("callbacks", watching), *own_callbacks("on_round", on_round)]
    return SimulateArguments(plain, typed, watching, own)


def read_run(folder: str | Path, *, trust: Sequence[str] = ()) -> RunResult:
    """Read a run from its folder: its history and its model, to measure and predict.

    Args:
        folder: The run folder. It does not contain data or models of a program: for such a run call
            `simulate` with the same objects and ``folder=..., resume=True``.
        trust: Modules that the run may name, as for `simulate`; other code is not run.

    Returns:
        The run; ``summary`` is empty if it has not finished.

    Raises:
        CheckpointError: If it is no run folder, or a file is missing or damaged.
        ConfigError: If it names code that is not trusted, listing all of it.
    """
    trust_all(trust)
    return measuring_run(user_path("folder", folder), 0)


@contextmanager
def usable(place: Path) -> Iterator[None]:
    """Turn errors of the system on a file in the run folder into errors of this project.

    Raises:
        ConfigError: Naming the file. Other errors, such as those of callbacks, are not changed.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or not Path(str(error.filename)).is_relative_to(place):
            raise
        raise ConfigError(f"folder: {of_system(error)}") from error


def place_of(plain: PlainDict, output: PlainDict, folder: str | Path | None) -> Path | None:
    """Return the requested run folder; None: the run is in memory.

    Raises:
        ConfigError: If two folders are given, or one by a key of the command line.
    """
    if plain.get("resume") is not None:
        raise ConfigError(
            f"resume={plain['resume']!r} in the config: in Python give folder=..., resume=True"
        )
    named = None if output.get("dir") is None else user_path("output.dir", output["dir"])
    if folder is None:
        return named
    place = user_path("folder", folder)
    if named not in {None, place}:
        raise ConfigError(f"folder={place}, but output.dir={named}: give one of them")
    return place
