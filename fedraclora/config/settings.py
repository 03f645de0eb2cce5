"""Settings of a run, group by group: frozen dataclasses that refuse what cannot run."""

# ruff: noqa: ARG002  (a hook has arguments that an override uses)

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.errors import ConfigError
from fedraclora.evaluation.metrics import MEASURED
from fedraclora.limits import (
    Count,
    Inner,
    Limit,
    Limited,
    NotNegative,
    OneOf,
    Positive,
    Seconds,
    Whole,
)
from fedraclora.privacy.secagg import LEAST_CLIENTS
from fedraclora.protocol.coding import NONE, ZSTD
from fedraclora.protocol.quantized import FULL, ROUNDED

DEPLOYED = Feature(
    "engine=deploy",
    instead="another engine",
    avoids={
        "an attack": "attacks only run in simulations",
        "system": "devices are simulated, and clients of a deployment are real",
        "max_failures": "engine.min_clients says how many clients a round needs",
        "head=personal that the server measures": "such heads stay at the clients",
    },
)
MOST_THREADS = 1024  # of torch: where the system refuses one, the process ends without a word
Threads = Annotated[int, Ge(1), Le(MOST_THREADS)]
Chunk = Annotated[
    int | str,
    Limit("auto, or a number of clients,", lambda n: n == "auto" or (isinstance(n, int) and n > 0)),
]


@dataclass(frozen=True)
class CompressionConfig(Limited, group="compression"):
    """How numbers go up and down: as they are trained, or rounded to fewer bits.

    Attributes:
        uplink: Rounded at random; int8 and int4 with a scale for each block, without bias, eden4 to
            eden1 in 4 to 1 bits after a random rotation, with a bias where few numbers are large.
        downlink: The same, on the way to the clients.
        feedback: What rounding left is added to what is sent next (error feedback).
        uplink_coding: Lossless coding of quantized uploads.
        downlink_coding: The same for downloads, catch-up included.
    """

    uplink: Annotated[str, OneOf((FULL, *ROUNDED))] = FULL
    downlink: Annotated[str, OneOf((FULL, *ROUNDED))] = FULL
    feedback: bool = False
    uplink_coding: Annotated[str, OneOf((NONE, ZSTD))] = NONE
    downlink_coding: Annotated[str, OneOf((NONE, ZSTD))] = NONE

    @override
    def __post_init__(self) -> None:
        """Reject feedback and coding of numbers that are not rounded."""
        super().__post_init__()
        if self.feedback and self.uplink == self.downlink == FULL:
            raise ConfigError(
                "compression.feedback is true, but with compression.uplink=float32 and "
                "compression.downlink=float32 "
                f"rounding leaves nothing; set one of them to one of {', '.join(ROUNDED)}"
            )
        for way in ("uplink", "downlink"):
            coding = getattr(self, f"{way}_coding")
            if coding != NONE and getattr(self, way) == FULL:
                raise ConfigError(
                    f"compression.{way}_coding is {coding}, but with compression.{way}=float32 "
                    "nothing is "
                    f"gained by it; set compression.{way} to one of {', '.join(ROUNDED)}"
                )


@dataclass(frozen=True, kw_only=True)
class WaitPolicy:
    """How the loop waits for clients on an engine.

    Attributes:
        timeout: Seconds to wait for replies; None where the engine knows when to give up.
        untrusted: Whether clients are other people's machines: then whatever one of them sends is a
            failure of that client alone, and `min_clients` says when a round has failed.
        min_clients: Of an untrusted run: replies that a round needs; None: of all clients asked.
        max_samples: Of an untrusted run: the most samples, or local steps, that a client can claim.
        retries: Times that a round that failed is run again.
    """

    timeout: float | None = None
    untrusted: bool = False
    min_clients: int | None = None
    max_samples: int = 10_000_000
    retries: int = 0

    @DEPLOYED
    def _asks_others(self) -> bool:
        return self.untrusted


@dataclass(frozen=True)
class EngineConfig(Limited, group="engine"):
    """Whole chunks of clients as one batch, in this process (CPU or GPU).

    Attributes:
        chunk: Clients per batch; auto: from the memory of one client.
        threads: Of torch, in each process that trains.
    """

    name: ClassVar[str] = "vectorized"

    chunk: Chunk = "auto"
    threads: Threads = 1

    def waiting(self, cohort: int) -> WaitPolicy:
        """Return how the loop waits for clients.

        Args:
            cohort: Clients that a round asks.

        Raises:
            ConfigError: If a round needs more replies than that.
        """
        return WaitPolicy()  # Ray's workers have a limit for each chunk; in this process none waits

    def fewest(self, cohort: int, max_failures: int) -> int:
        """Count the clients of a cohort that a round has at least, where all are asked."""
        return cohort - max_failures


@dataclass(frozen=True)
class InlineConfig(EngineConfig):
    """One client after another, in this process: reference and debugging."""

    name: ClassVar[str] = "inline"

    chunk: Chunk = 1

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk != 1:
            raise ConfigError(
                f"engine.chunk is {self.chunk!r}, but engine={self.name} trains one client at a "
                "time: leave it out, or choose engine=vectorized"
            )


@dataclass(frozen=True)
class RayConfig(EngineConfig):
    """Chunks of clients on resident Ray workers, on this machine or a cluster.

    Attributes:
        workers: Processes that train; None = one per free CPU (or GPU) of the cluster.
        gpus: Share of a GPU for each worker; None = 1 where the device is cuda, else 0.
        address: Of a cluster to join (``auto``, ``host:port``); None: RAY_ADDRESS; without that, or
            with ``local``, one is started on this machine.
        retries: Workers that may die or hang at the same chunk before the run stops.
        timeout: Seconds after which a worker that has not answered for its chunk counts as hung.
        wait: Seconds to wait for a worker where none is ready, before the run stops.
    """

    name: ClassVar[str] = "ray"

    workers: Count | None = None
    gpus: NotNegative | None = None
    address: str | None = None
    retries: Whole = 3
    timeout: Seconds = 3600.0
    wait: Seconds = 300.0

    @property
    def share(self) -> float:
        """Share of a GPU that a worker has, if it has one; workers that ask for none divide it."""
        if self.gpus == 0:
            return 1 / (self.workers or os.cpu_count() or 1)
        return 1.0 if self.gpus is None else min(1.0, self.gpus)


@DEPLOYED
@dataclass(frozen=True)
class DeployConfig(EngineConfig):
    """Real SuperNodes on hosts of their own, by `fedraclora deploy`; the bits of inline.

    Attributes:
        chunk: Clients of one node that train as one batch, where they stand in one chunk of the
            cohort; 1: one after another. With more the bits are those of ``engine=vectorized``.
        min_clients: Replies that a round needs; None = of all clients that are asked.
        wait: Seconds to wait until so many of them are connected.
        timeout: Seconds to wait for the replies of an exchange.
        retries: Times that a round with fewer replies is run again before the run stops.
        max_samples: The most samples that a client can claim to have.
        max_claims: The most clients that several nodes may claim in a run; None = any number.
        folder: Of the server, on its machine; None = ``~/fedraclora/<name of the run folder>``.
    """

    name: ClassVar[str] = "deploy"

    chunk: Chunk = 1
    min_clients: Count | None = None
    wait: Seconds = 300.0
    timeout: Seconds = 3600.0
    retries: Whole = 2
    max_samples: Count = 10_000_000
    max_claims: Whole | None = None
    folder: str | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk == "auto":
            raise ConfigError(
                "engine.chunk is auto, but with engine=deploy nobody knows the memory of all nodes "
                "before a run: set a number of clients (1: one after another)"
            )
        if self.folder is not None and not self.folder.startswith("/"):
            raise ConfigError(f"engine.folder is {self.folder!r}; an absolute path is wanted")

    @override
    def waiting(self, cohort: int) -> WaitPolicy:
        if (self.min_clients or 1) > cohort:
            raise ConfigError(
                f"engine.min_clients is {self.min_clients}, but a round asks {cohort} clients"
            )
        return WaitPolicy(
            timeout=self.timeout,
            untrusted=True,
            min_clients=self.min_clients,
            max_samples=self.max_samples,
            retries=self.retries,
        )

    @override
    def fewest(self, cohort: int, max_failures: int) -> int:
        return min(self.min_clients or cohort, cohort)


ENGINES: dict[str, type[EngineConfig]] = {
    kind.name: kind for kind in (EngineConfig, InlineConfig, RayConfig, DeployConfig)
}


@dataclass(frozen=True)
class OutputConfig(Limited, group="output"):
    """Everything: ledger, chain, checkpoints every 10 rounds, pictures, progress bar.

    Attributes:
        dir: The run folder; None: runs/<date>/<time>, in a sweep
            multirun/<date>/<time>/<overrides>.
        checkpoint_every: Rounds between checkpoints.
        chain: Keep the link of every round.
        sync: Flush to the disk with each row.
        progress: Show a progress bar.
        plots: Draw curves.png and partition.png.
        loggers: Where rounds are shown, too: tensorboard, mlflow, wandb, trackio (docs/watch.md).
        shared: Whether others may use the run folder as far as your umask lets them.
    """

    in_memory: ClassVar[tuple[str, ...]] = ("dir", "progress")  # read where nothing is written

    dir: str | None = None
    checkpoint_every: Count = 10
    chain: bool = True
    sync: bool = True
    progress: bool = True
    plots: bool = True
    loggers: Sequence[str] = ()
    shared: bool = False

    @Feature("output.checkpoint_every above 1", instead="output.checkpoint_every=1")
    def _checkpoints_rarely(self) -> str:
        rarely = self.checkpoint_every != 1
        return f"output.checkpoint_every is {self.checkpoint_every}" if rarely else ""


UNCOVERED = (
    "clients tell the server what they measured, to which no noise is added and which no account "
    "of epsilon has"
)
HELD_OUT = 0.2
WHO_MEASURES = ("none", "round", "all")


@dataclass(frozen=True)
class EvaluateConfig(Limited, group="evaluate"):
    """When and on what the server measures, and clients on samples of their own.

    Attributes:
        every: Rounds between evaluations.
        batch_size: Samples of a forward pass.
        split: test or validation.
        clients: Which clients measure on samples of their own that are never trained on: none,
            those of the round, or all.
        sample: If clients keep a part of the model to themselves and none measures: how many
            clients' models the server measures.
        min_clients: Under secure=secagg and privacy=client_level: what clients measure is released
            if so many hold samples to measure on, or more.
        share: Of each client's samples, the part that it measures on and never trains on; None:
            its own test samples where the data have them, else 0.2.
        clients_every: Rounds between measurements of the clients.
        personal: Whether these train in between, and measure again after it.
        choices: Questions answered by the likeliest of their choices (data.choices); None: none.
        generate: Of language models: rounds between greedy answers to prompts; None: none.
        answers: How many prompts are answered.
        new_tokens: Of an answer at most.
        shown: Answers that the ledger keeps.
    """

    every: Count = 1
    batch_size: Count = 1024
    split: Annotated[str, OneOf(("test", "validation"))] = "test"
    clients: Annotated[str, OneOf(WHO_MEASURES)] = "none"
    sample: Count = 20
    min_clients: Annotated[int, Ge(LEAST_CLIENTS)] = 5
    share: Inner | None = None
    clients_every: Count = 1
    personal: bool = False
    choices: Count | None = None
    generate: Count | None = None
    answers: Count = 64
    new_tokens: Count = 32
    shown: Whole = 4

    @property
    def by_clients(self) -> bool:
        """Return whether clients measure."""
        return self.clients != "none"

    @Feature(
        "clients that measure",
        instead="evaluate.clients=none",
        avoids={
            "local.dp": UNCOVERED,
            "privacy=client_level beside secure=secagg": UNCOVERED,
        },
    )
    def _asks_clients(self) -> str:
        return f"evaluate.clients is {self.clients}" if self.by_clients else ""

    @property
    def portion(self) -> float | None:
        """Return which part of its samples each client holds out; None: nothing."""
        share = HELD_OUT if self.share is None else self.share
        return share if self.by_clients else None

    @property
    def source(self) -> dict[str, Any]:
        """Return which samples these are: of which split, and whether a client's own test is."""
        return {"split": self.split, "own_tests": self.share is None and self.split == "test"}


STOPPED_BY = OneOf(MEASURED, others=True)  # what a run measures besides


@dataclass(frozen=True)
class StopConfig(Limited, group="stop"):
    """When a run ends before its last round, where nothing improves any more.

    Attributes:
        metric: Of the validation split (data.validation); or of clients that measure, such as
            clients.accuracy.worst10 (evaluate.clients).
        patience: Evaluations without improvement after which a run ends; None: never.
        min_delta: By how much the metric must improve on the last improvement to count as one.
    """

    metric: Annotated[str, STOPPED_BY] = "loss"
    patience: Count | None = None
    min_delta: NotNegative = 0.0


@dataclass(frozen=True)
class PretrainConfig(Limited, group="pretrain"):
    """Central training of the initial weights, with AdamW; none with 0 epochs.

    Attributes:
        labels: Classes to train on; None: all.
        epochs: Passes over their samples; 0: none.
        lr: Of AdamW.
        batch_size: Samples of a step.
    """

    labels: list[int] | None = None
    epochs: Whole = 0
    lr: Positive = 1e-3
    batch_size: Count = 64
