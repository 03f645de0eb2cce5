"""From a plain nested dict (a resolved Hydra config) to checked, frozen settings.

Each group of the config names a row of a table (``method.name``, ``data.name``, ...). Its other
keys must be the keyword arguments of that row: signatures are the schema, so a wrong key, type or
name is refused here, with the names that exist and the nearest one.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedraclora.adapter import BIAS_POLICIES, HEAD_POLICIES
from fedraclora.aggregator import AGGREGATORS
from fedraclora.data import DATASETS, PARTITIONS
from fedraclora.errors import ConfigError, unknown
from fedraclora.method import Method
from fedraclora.models import MODELS
from fedraclora.optimiser import LocalConfig
from fedraclora.sampling import WEIGHTINGS
from fedraclora.schema import Plain, bind, build, coerce, section, without

ENGINES = ("vectorised", "inline")
DEVICES = ("auto", "cpu", "cuda")
NOT_IN_DIGEST = ("output", "resume")


def digested(plain: Plain) -> dict[str, object]:
    """The part of a config that decides the result: neither where data lie nor what is written."""
    kept = {k: v for k, v in plain.items() if k not in NOT_IN_DIGEST}
    if isinstance(data := kept.get("data"), Mapping):
        kept["data"] = without(data, "root")
    return kept


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
    """When and on what the server measures.

    ``split``: test or validation. ``clients``: with a local head, how many clients' own models.
    """

    every: int = 1
    batch_size: int = 1024
    split: str = "test"
    clients: int = 20

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if min(self.every, self.batch_size, self.clients) < 1:
            raise ConfigError("evaluate.every, batch_size and clients must be 1 or more")
        if self.split not in {"test", "validation"}:
            raise unknown("evaluate.split", self.split, ("test", "validation"))


@dataclass(frozen=True)
class PretrainConfig:
    """Central training of the initial weights on some labels, with AdamW; epochs 0 = none."""

    labels: list[int] | None = None
    epochs: int = 0
    lr: float = 1e-3
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        if self.epochs < 0 or self.batch_size < 1:
            raise ConfigError(
                f"pretrain.epochs is {self.epochs} and pretrain.batch_size is {self.batch_size}; "
                "0 or more and 1 or more are wanted"
            )
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"pretrain.lr is {self.lr}; a positive finite number is wanted")


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
        aggregator: A key of `fedraclora.aggregator.AGGREGATORS`.
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
        return digested(self.plain)


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
    tables: dict[str, Iterable[str]] = {
        "data": DATASETS,
        "model": MODELS,
        "partition": PARTITIONS,
    }
    for kind, table in tables.items():
        name = section(plain, kind).get("name")
        if name not in [*table]:
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
    if config.clients is not None and config.cohort > config.clients:
        raise ConfigError(
            f"cohort is {config.cohort}, but there are only {config.clients} clients; "
            "lower cohort or raise clients"
        )
    if config.max_failures < 0:
        raise ConfigError(f"max_failures is {config.max_failures}; 0 or more is wanted")
    choices: dict[str, Iterable[str]] = {
        "device": DEVICES,
        "aggregator": AGGREGATORS,
        "weights": WEIGHTINGS,
        "head": HEAD_POLICIES,
        "bias": BIAS_POLICIES,
    }
    for key, known in choices.items():
        if getattr(config, key) not in known:
            raise unknown(key, getattr(config, key), known)
    if config.output.checkpoint_every < 1:
        raise ConfigError("output.checkpoint_every must be 1 or more")
