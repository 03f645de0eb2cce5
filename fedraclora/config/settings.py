"""Settings of a run, group by group: frozen dataclasses that refuse what cannot run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from fedraclora.errors import ConfigError, unknown

MOST_THREADS = 1024  # of torch: where the system refuses one, the process ends without a word


@dataclass(frozen=True)
class Waiting:
    """How the loop waits for clients on an engine; the fields are those of its `LoopConfig`."""

    timeout: float | None = None
    guarded: bool = False
    min_clients: int | None = None
    max_samples: int = 10_000_000
    retries: int = 0


@dataclass(frozen=True)
class EngineConfig:
    """What every engine has. ``chunk``: clients per batch or ``auto``; ``threads``: of torch."""

    name: ClassVar[str] = "vectorised"

    chunk: int | str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        if isinstance(self.chunk, str) and self.chunk != "auto":
            raise ConfigError(f"engine.chunk is {self.chunk!r}; a number of clients or auto")
        if isinstance(self.chunk, int) and self.chunk < 1:
            raise ConfigError(f"engine.chunk is {self.chunk}; 1 or more is wanted")
        if not 1 <= self.threads <= MOST_THREADS:
            raise ConfigError(f"engine.threads is {self.threads}; 1 to {MOST_THREADS} are wanted")

    def waiting(self, cohort: int) -> Waiting:
        """Say how the loop waits for clients.

        Args:
            cohort: Clients that a round asks.

        Raises:
            ConfigError: If a round needs more replies than that.
        """
        del cohort
        return Waiting()  # Ray's workers have a limit for each chunk; in this process none waits

    def fewest(self, cohort: int, max_failures: int) -> int:
        """Give how many clients of a cohort a round has at least, where all are asked."""
        return cohort - max_failures


@dataclass(frozen=True)
class InlineConfig(EngineConfig):
    """One client after another, in this process."""

    name: ClassVar[str] = "inline"

    chunk: int | str = 1

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk != 1:
            raise ConfigError(
                f"engine.chunk is {self.chunk!r}, but engine={self.name} trains one client at a "
                "time: leave it out, or choose engine=vectorised"
            )


def check_workers(config: RayConfig | FlowerConfig) -> None:
    """Refuse impossible numbers of processes, shares of GPUs, retries and seconds."""
    if config.workers is not None and config.workers < 1:
        raise ConfigError(f"engine.workers is {config.workers}; 1 or more, or null, is wanted")
    if config.gpus is not None and not 0 <= config.gpus < math.inf:
        raise ConfigError(f"engine.gpus is {config.gpus}; 0 or more, or null, is wanted")
    if config.retries < 0:
        raise ConfigError(f"engine.retries is {config.retries}; 0 or more is wanted")
    if not 0 < config.timeout < math.inf:
        raise ConfigError(f"engine.timeout is {config.timeout}; seconds above 0 are wanted")


@dataclass(frozen=True)
class RayConfig(EngineConfig):
    """Chunks on resident Ray workers.

    Attributes:
        workers: Processes that train; None = one per free CPU (or GPU) of the cluster.
        gpus: Share of a GPU for each worker; None = 1 where the device is cuda, else 0.
        address: Of a cluster to join (``auto``, ``host:port``); None starts one on this machine.
        retries: Workers that may die or hang in a round before the run stops.
        timeout: Seconds after which a worker that has not answered for its chunk counts as hung.
    """

    name: ClassVar[str] = "ray"

    workers: int | None = None
    gpus: float | None = None
    address: str | None = None
    retries: int = 3
    timeout: float = 3600.0

    @property
    def share(self) -> float:
        """Share of a GPU that a worker has, if it has one; workers that ask for none divide it."""
        if self.gpus == 0:
            return 1 / (self.workers or os.cpu_count() or 1)
        return 1.0 if self.gpus is None else min(1.0, self.gpus)

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_workers(self)


@dataclass(frozen=True)
class FlowerConfig(InlineConfig):
    """Flower's simulation runtime on its Ray backend: one node per client.

    Attributes:
        workers: Client processes at a time; None = one per CPU.
        gpus: Share of a GPU for each process; None = 1 where the device is cuda, else 0.
        retries: Times that the work of a process that died is done again before it counts as a
            failure of its client.
        timeout: Seconds to wait for the replies of a round.
    """

    name: ClassVar[str] = "flower"

    workers: int | None = None
    gpus: float | None = None
    retries: int = 3
    timeout: float = 3600.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_workers(self)

    @override
    def waiting(self, cohort: int) -> Waiting:
        return Waiting(timeout=self.timeout)


@dataclass(frozen=True)
class DeployConfig(InlineConfig):
    """Real SuperNodes, each with the data of its clients.

    Attributes:
        min_clients: Replies that a round needs; None = of all clients that are asked.
        wait: Seconds to wait until so many of them are connected.
        timeout: Seconds to wait for the replies of an exchange.
        retries: Times that a round with fewer replies is run again before the run stops.
        max_samples: The most samples that a client can claim to have.
        folder: Where the server keeps the run, by its whole path on the SuperLink's machine;
            None = ``fedraclora/<name of the run folder>`` in the home of its user.
    """

    name: ClassVar[str] = "deploy"

    min_clients: int | None = None
    wait: float = 300.0
    timeout: float = 3600.0
    retries: int = 2
    max_samples: int = 10_000_000
    folder: str | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("wait", "timeout"):
            if not 0 < (seconds := getattr(self, key)) < math.inf:
                raise ConfigError(f"engine.{key} is {seconds}; seconds above 0 are wanted")
        if self.min_clients is not None and self.min_clients < 1:
            raise ConfigError(
                f"engine.min_clients is {self.min_clients}; 1 or more, or null, is wanted"
            )
        if self.retries < 0 or self.max_samples < 1:
            raise ConfigError(
                f"engine.retries is {self.retries} and engine.max_samples is {self.max_samples}; "
                "0 or more and 1 or more are wanted"
            )

    @override
    def waiting(self, cohort: int) -> Waiting:
        if (self.min_clients or 1) > cohort:
            raise ConfigError(
                f"engine.min_clients is {self.min_clients}, but a round asks {cohort} clients"
            )
        return Waiting(self.timeout, True, self.min_clients, self.max_samples, self.retries)

    @override
    def fewest(self, cohort: int, max_failures: int) -> int:
        return min(self.min_clients or cohort, cohort)


ENGINES: dict[str, type[EngineConfig]] = {
    kind.name: kind for kind in (EngineConfig, InlineConfig, RayConfig, FlowerConfig, DeployConfig)
}


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
    ``generate``: rounds between answers of a language model to ``answers`` prompts of that split,
    None: it never answers; of ``new_tokens`` at most, the first ``shown`` of them in the ledger.
    """

    every: int = 1
    batch_size: int = 1024
    split: str = "test"
    clients: int = 20
    generate: int | None = None
    answers: int = 64
    new_tokens: int = 32
    shown: int = 4

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if min(self.every, self.batch_size, self.clients) < 1:
            raise ConfigError("evaluate.every, batch_size and clients must be 1 or more")
        if min(self.generate or 1, self.answers, self.new_tokens) < 1 or self.shown < 0:
            raise ConfigError(
                "evaluate.generate (or null), answers and new_tokens must be 1 or more, and shown "
                "0 or more"
            )
        if self.split not in {"test", "validation"}:
            raise unknown("evaluate.split", self.split, ("test", "validation"))


@dataclass(frozen=True)
class StopConfig:
    """When a run ends before its last round (`strategies.server.stopping`).

    ``metric``: of the validation split. ``patience``: evaluations without improvement; None: never.
    """

    metric: str = "loss"
    patience: int | None = None

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"stop.patience is {self.patience}; 1 or more, or null, is wanted")


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
