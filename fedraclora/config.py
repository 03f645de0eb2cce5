"""From a plain nested dict (a resolved Hydra config) to checked, frozen settings.

Each group of the config names a row of a table (``method.name``, ``data.name``, ...). Its other
keys must be the keyword arguments of that row: signatures are the schema, so a wrong key, type or
name is refused here, with the names that exist and the nearest one.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedraclora.aggregate import AGGREGATORS
from fedraclora.data import DATASETS
from fedraclora.errors import ConfigError, unknown
from fedraclora.method import Method
from fedraclora.models import MODELS
from fedraclora.optimiser import LocalConfig

Plain = Mapping[str, object]
ENGINES = ("vectorised", "inline")
DEVICES = ("auto", "cpu", "cuda")
NOT_IN_DIGEST = ("output", "resume")


@dataclass(frozen=True)
class EngineConfig:
    """Where clients run. ``chunk``: clients per batch or ``auto``; ``threads``: of torch."""

    name: str = "vectorised"
    chunk: int | str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        if self.name not in ENGINES:
            raise unknown("engine", self.name, ENGINES)
        if isinstance(self.chunk, str) and self.chunk != "auto":
            raise ConfigError(f"engine.chunk is {self.chunk!r}; a number of clients or auto")
        if isinstance(self.chunk, int) and self.chunk < 1:
            raise ConfigError(f"engine.chunk is {self.chunk}; 1 or more is wanted")
        if self.threads < 1:
            raise ConfigError(f"engine.threads is {self.threads}; 1 or more is wanted")


@dataclass(frozen=True)
class OutputConfig:
    """What a run leaves behind, and how carefully it is written.

    Attributes:
        dir: The run folder; None = runs/<date>/<time>.
        checkpoint_every: Rounds between checkpoints.
        chain: Keep the link of every round.
        sync: Flush to the disk with each row.
        progress: Show a progress bar.
        plots: Draw curves.png and partition.png.
    """

    dir: str | None = None
    checkpoint_every: int = 10
    chain: bool = True
    sync: bool = True
    progress: bool = True
    plots: bool = True


@dataclass(frozen=True)
class EvaluateConfig:
    """When and on what the server measures. ``split``: test or validation."""

    every: int = 1
    batch_size: int = 1024
    split: str = "test"

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.every < 1 or self.batch_size < 1:
            raise ConfigError("evaluate.every and evaluate.batch_size must be 1 or more")
        if self.split not in {"test", "validation"}:
            raise unknown("evaluate.split", self.split, ("test", "validation"))


@dataclass(frozen=True)
class PretrainConfig:
    """Central training of the initial weights on some labels, with AdamW; epochs 0 = none."""

    labels: list[int] | None = None
    epochs: int = 0
    lr: float = 1e-3
    batch_size: int = 64


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run is made from.

    Attributes:
        plain: The dict this was read from.
        method: The method, its hyperparameters checked.
        data, partition, model: Tables' rows and their arguments.
        local, engine, evaluate, pretrain, output: Settings.
        clients: Clients that are asked for; None where the data brings its own division.
        cohort: Clients per round; a fraction of them if below 1.
        rounds: Rounds.
        seed: Of the run.
        device: auto, cpu or cuda.
        weights: examples or uniform.
        head, bias, targets, dense: The policy of `fedraclora.adapter.make_plan`.
        aggregator: A key of `fedraclora.aggregate.AGGREGATORS`.
        max_failures: Clients that may fail in a round.
    """

    plain: Plain
    method: Method
    data: Plain
    partition: Plain
    model: Plain
    local: LocalConfig
    engine: EngineConfig
    evaluate: EvaluateConfig
    pretrain: PretrainConfig
    output: OutputConfig
    clients: int | None
    cohort: int | float
    rounds: int
    seed: int
    device: str
    weights: str
    head: str
    bias: str
    targets: str | None
    dense: str | None
    aggregator: str
    max_failures: int

    @property
    def digested(self) -> dict[str, object]:
        """The part of the config that decides the result."""
        return {k: v for k, v in self.plain.items() if k not in NOT_IN_DIGEST}


def from_plain(plain: Plain, methods: Mapping[str, type[Method]]) -> RunConfig:
    """Check a plain config and build the settings.

    Args:
        plain: Nested dict of plain values (see ``conf/config.yaml`` for the keys).
        methods: The METHODS table of `strategies`, handed in since it lies above this module.

    Returns:
        The settings.

    Raises:
        ConfigError: Naming the key, what came and what was wanted.
    """
    groups = {
        "method": bind("method", methods, section(plain, "method"))(),
        "data": section(plain, "data"),
        "partition": section(plain, "partition"),
        "model": section(plain, "model"),
        "local": build("local", LocalConfig, without(section(plain, "local"), "name")),
        "engine": build("engine", EngineConfig, section(plain, "engine")),
        "evaluate": build("evaluate", EvaluateConfig, section(plain, "evaluate")),
        "pretrain": build("pretrain", PretrainConfig, without(section(plain, "pretrain"), "name")),
        "output": build("output", OutputConfig, without(section(plain, "output"), "name")),
    }
    for kind, table in (("data", DATASETS), ("model", MODELS)):
        name = section(plain, kind).get("name")
        if name not in table:
            raise unknown(kind, name, table)
    hints = typing.get_type_hints(RunConfig)
    rest = {}
    for key in inspect.signature(RunConfig).parameters:
        if key in groups or key == "plain":
            continue
        if key not in plain:
            raise ConfigError(f"the config has no key {key}; see conf/config.yaml")
        rest[key] = coerce(key, plain[key], hints[key])
    config = RunConfig(plain=plain, **groups, **rest)  # type: ignore[arg-type]
    _check(config)
    return config


def _check(config: RunConfig) -> None:
    """Check what no single group can know."""
    if config.rounds < 0:
        raise ConfigError(f"rounds is {config.rounds}; 0 or more is wanted")
    if config.clients is not None and config.clients < 1:
        raise ConfigError(f"clients is {config.clients}; 1 or more is wanted")
    if not config.cohort > 0 or (isinstance(config.cohort, float) and config.cohort > 1):
        raise ConfigError(
            f"cohort is {config.cohort}; a number of clients, or a fraction in (0, 1], is wanted"
        )
    if isinstance(config.clients, int) and isinstance(config.cohort, int):
        if config.cohort > config.clients:
            raise ConfigError(
                f"cohort is {config.cohort}, but there are only {config.clients} clients; "
                "lower cohort or raise clients"
            )
    if config.device not in DEVICES:
        raise unknown("device", config.device, DEVICES)
    if config.aggregator not in AGGREGATORS:
        raise unknown("aggregator", config.aggregator, AGGREGATORS)
    if config.output.checkpoint_every < 1:
        raise ConfigError("output.checkpoint_every must be 1 or more")


def section(plain: Plain, key: str) -> dict[str, object]:
    """Give one group of the config as a dict.

    Raises:
        ConfigError: If it is missing or not a group.
    """
    value = plain.get(key)
    if not isinstance(value, Mapping):
        raise ConfigError(f"the config needs a group {key}, but has {value!r}")
    return dict(value)


def without(group: Plain, *keys: str) -> dict[str, object]:
    """Copy a group without some keys."""
    return {k: v for k, v in group.items() if k not in keys}


T = typing.TypeVar("T")


def bind(
    kind: str, table: Mapping[str, Callable[..., T]], group: Plain, **given: object
) -> Callable[[], T]:
    """Look a group's ``name`` up in a table and bind its other keys as arguments.

    Args:
        kind: The group's key, for messages.
        table: Callables by name.
        group: The group.
        **given: Arguments that the config does not set; they win over nothing in the group.

    Returns:
        The call, ready to be made.

    Raises:
        ConfigError: For an unknown name or key, or a value of the wrong type.
    """
    name = group.get("name")
    if name not in table:
        raise unknown(kind, name, table)
    target = table[str(name)]
    arguments = checked_arguments(kind, target, without(group, "name"))
    wanted = inspect.signature(target).parameters
    given = {k: v for k, v in given.items() if k in wanted and k not in arguments}
    return functools.partial(target, **arguments, **given)


def build(kind: str, target: Callable[..., T], group: Plain) -> T:
    """Call ``target`` with the keys of a group, checked."""
    return target(**checked_arguments(kind, target, group))


def checked_arguments(kind: str, target: Callable[..., object], group: Plain) -> dict[str, object]:
    """Hold a group's keys and types against a signature."""
    parameters = inspect.signature(target).parameters
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    arguments = {}
    for key, value in group.items():
        if key not in parameters:
            raise unknown("key", f"{kind}.{key}", [f"{kind}.{p}" for p in parameters])
        arguments[key] = coerce(f"{kind}.{key}", value, hints.get(key, object))
    return arguments


def coerce(key: str, value: object, hint: object) -> object:
    """Check a plain value against a type hint; an int may stand for a float.

    Raises:
        ConfigError: Naming the key, the value and the wanted type.

    Example:
        >>> coerce("local.lr", 1, float)
        1.0
        >>> coerce("method.rank", "four", int)
        Traceback (most recent call last):
        ...
        fedraclora.errors.ConfigError: method.rank is 'four'; int is wanted
    """
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if option is object or (value is None and option is type(None)):
            return value
        if isinstance(origin, type) and isinstance(value, origin):
            if isinstance(value, bool) and origin is not bool:
                continue
            return value
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    names = " or ".join(
        "null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options
    )
    raise ConfigError(f"{key} is {value!r}; {names} is wanted")


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in {typing.Union, types.UnionType}


def resolve_path(path: str | None) -> Path | None:
    """Expand a path that a user typed (``~`` and variables), or None."""
    return None if path is None else Path(path).expanduser()
