"""Settings of a run, group by group: frozen dataclasses that reject invalid values."""

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
        "simulated devices": "the clients of a deployment are real",
        "max_failures": "engine.min_clients sets how many clients a round needs",
        "head=personal that the server measures": "the server does not have these heads",
    },
)
ROUNDS_UP = Feature(
    "compression.uplink below float32",
    instead="compression.uplink=float32",
    reads=("compression.uplink_coding",),
)
ROUNDS_DOWN = Feature(
    "compression.downlink below float32",
    instead="compression.downlink=float32",
    avoids={
        "a method whose clients send numbers along random directions": (
            "clients repeat the server's steps exactly"
        ),
        "factors or magnitudes that hold a part of the weights": (
            "they are sent whole in each round, so quantization would damage the model itself"
        ),
    },
    reads=("compression.downlink_coding",),
)
# most threads of torch: if the system refuses one, the process ends without a message
MOST_THREADS = 1024
Threads = Annotated[int, Ge(1), Le(MOST_THREADS)]
Chunk = Annotated[
    int | str,
    Limit("auto, or a number of clients,", lambda n: n == "auto" or (isinstance(n, int) and n > 0)),
]


@dataclass(frozen=True)
class CompressionConfig(Limited, group="compression"):
    """Compression of updates: how numbers are quantized on their way up and down.

    Attributes:
        uplink: Quantization of what clients send. int8 and int4 use a scale for each block and are
            unbiased; eden4 to eden1 use 4 to 1 bits after a random rotation, and are biased if few
            numbers are large.
        downlink: Quantization of what the server sends, as ``uplink``.
        feedback: Error feedback: add each message's quantization error to the next message.
        uplink_coding: Lossless coding of quantized numbers that clients send.
        downlink_coding: Lossless coding of quantized numbers that the server sends, catch-up
            included.
    """

    uplink: Annotated[str, OneOf((FULL, *ROUNDED))] = FULL
    downlink: Annotated[str, OneOf((FULL, *ROUNDED))] = FULL
    feedback: bool = False
    uplink_coding: Annotated[str, OneOf((NONE, ZSTD))] = NONE
    downlink_coding: Annotated[str, OneOf((NONE, ZSTD))] = NONE

    @ROUNDS_UP
    def _rounds_up(self) -> str:
        return rounds("uplink", self.uplink)

    @ROUNDS_DOWN
    def _rounds_down(self) -> str:
        return rounds("downlink", self.downlink)

    @Feature(
        "compression below float32",
        take=f"compression.uplink or compression.downlink as one of {', '.join(ROUNDED)}",
        reads=("compression.feedback",),
    )
    def _rounds(self) -> bool:
        return not self.uplink == self.downlink == FULL


def rounds(way: str, kind: str) -> str:
    """Say in how few bits numbers go up or down; empty: in all that they have."""
    return "" if kind == FULL else f"compression.{way}={kind}"


@dataclass(frozen=True, kw_only=True)
class WaitPolicy:
    """How the loop waits for clients on an engine.

    Attributes:
        timeout: Seconds to wait for replies; None where the engine knows when to give up.
        untrusted: Whether clients are other people's machines: then an invalid reply is a failure
            of that client alone, and a round fails with fewer than `min_clients` replies.
        min_clients: In an untrusted run, the replies that a round needs; None: those of all clients
            asked.
        max_samples: In an untrusted run, the most samples, or local steps, that a client can
            report.
        retries: How often a failed round is run again.
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
        threads: Threads of torch in each process that trains.
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
        """Return the least number of clients that a round of so many needs."""
        return cohort - max_failures


@dataclass(frozen=True)
class InlineConfig(EngineConfig):
    """One client after another, in this process: reference and debugging."""

    name: ClassVar[str] = "inline"

    chunk: Annotated[Chunk, Limit("1, one client after another,", lambda n: n == 1)] = 1


@dataclass(frozen=True)
class RayConfig(EngineConfig):
    """Chunks of clients on resident Ray workers, on this machine or a cluster.

    Attributes:
        workers: Processes that train; None = one per free CPU (or GPU) of the cluster.
        gpus: Share of a GPU for each worker; None = 1 where the device is cuda, else 0.
        address: Address of a cluster to join (``auto``, ``host:port``); None: RAY_ADDRESS. Without
            that, or with ``local``, a cluster is started on this machine.
        retries: How many workers may die or hang on the same chunk before the run stops.
        timeout: Seconds without an answer after which a worker counts as hung.
        wait: Seconds to wait for a worker to become ready before the run stops.
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
        """Share of a GPU that each worker has."""
        if self.gpus == 0:
            return 1 / (self.workers or os.cpu_count() or 1)
        return 1.0 if self.gpus is None else min(1.0, self.gpus)


@DEPLOYED
@dataclass(frozen=True)
class DeployConfig(EngineConfig):
    """Real SuperNodes on hosts of their own, by `fedraclora deploy`; the bits of inline.

    Attributes:
        chunk: How many clients of one node train as one batch if they are in the same chunk; 1: one
            after another. With more, results equal those of ``engine=vectorized``.
        min_clients: Replies that a round needs; None = those of all clients asked.
        straggler_wait: Once `min_clients` have replied, the others have this many seconds beyond
            twice the median time of a reply; None = until the timeout.
        wait: Seconds to wait until enough clients are connected.
        timeout: Seconds to wait for the clients' replies to a message.
        retries: How often a round with too few replies is run again before the run stops.
        max_samples: The most samples that a client can report.
        max_claims: How many clients may be claimed by several nodes in a run; None = any number.
        folder: The run folder on the server's machine; None = ``~/fedraclora/<name of the run
            folder>``.
    """

    name: ClassVar[str] = "deploy"

    chunk: Annotated[
        Chunk, Limit("a number (the memory of nodes is not known)", lambda n: n != "auto")
    ] = 1
    min_clients: Count | None = None
    straggler_wait: Seconds | None = 30.0
    wait: Seconds = 300.0
    timeout: Seconds = 3600.0
    retries: Whole = 2
    max_samples: Count = 10_000_000
    max_claims: Whole | None = None
    folder: str | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder is not None and not self.folder.startswith("/"):
            raise ConfigError(f"engine.folder={self.folder!r} is not an absolute path: give one")

    @override
    def waiting(self, cohort: int) -> WaitPolicy:
        if (self.min_clients or 1) > cohort:
            raise ConfigError(
                f"engine.min_clients={self.min_clients}, but a round asks {cohort} clients"
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
    """What a run writes: ledger, updates, checkpoints, figures, progress bar.

    Attributes:
        dir: The run folder; None: runs/<date>/<time>, in a sweep
            multirun/<date>/<time>/<overrides>.
        checkpoint_every: Rounds between checkpoints.
        chain: Keep the merged update of every round (the chain).
        sync: Flush the ledger to disk after each row.
        progress: Show a progress bar.
        verbose: Show all that a run begins with, which else its log alone has (run.log).
        plots: Draw curves.png and partition.png.
        loggers: Where to log rounds as well: tensorboard, mlflow, wandb, trackio (docs/watch.md).
        shared: Whether other users may access the run folder, as your umask allows.
    """

    in_memory: ClassVar[tuple[str, ...]] = (
        "dir",
        "progress",
        "verbose",
    )  # read where nothing is written

    dir: str | None = None
    checkpoint_every: Count = 10
    chain: bool = True
    sync: bool = True
    progress: bool = True
    verbose: bool = False
    plots: bool = True
    loggers: Sequence[str] = ()
    shared: bool = False

    @Feature("output.checkpoint_every above 1", instead="output.checkpoint_every=1")
    def _checkpoints_rarely(self) -> str:
        rarely = self.checkpoint_every != 1
        return f"output.checkpoint_every={self.checkpoint_every}" if rarely else ""


UNCOVERED = (
    "clients send the server their metrics without noise, and epsilon does not account for them"
)
HELD_OUT = 0.2
WHO_MEASURES = ("none", "round", "all")


@dataclass(frozen=True)
class EvaluateConfig(Limited, group="evaluate"):
    """When and on which samples the server and the clients evaluate.

    Attributes:
        every: Rounds between evaluations.
        batch_size: Samples in a forward pass.
        split: test or validation.
        clients: Which clients evaluate on their own held-out samples (federated evaluation): none,
            those of the round, or all.
        sample: How many clients' models the server evaluates if clients keep a personal part of the
            model and do not evaluate themselves.
        min_clients: Under secure=secagg or privacy=client_level: release clients' metrics only if
            at least this many clients have samples to evaluate on.
        share: The share of each client's samples that is held out for its evaluation; None: its own
            test samples if the data have them, else 0.2.
        clients_every: Rounds between evaluations by the clients.
        personal: Whether clients also evaluate again after local training (personalization).
        choices: How many multiple-choice questions (data.choices) are answered by the likeliest
            choice; None: none.
        generate: Rounds between a language model's greedy answers to prompts; None: never.
        answers: How many prompts are answered.
        new_tokens: The most tokens of an answer.
        shown: How many answers the ledger keeps.
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
        """Return whether clients evaluate."""
        return self.clients != "none"

    @Feature(
        "clients that measure",
        instead="evaluate.clients=none",
        take="clients that measure (evaluate.clients=round and all)",
        avoids={
            "local.dp": UNCOVERED,
            "data.objects=true": "only your training function can read them",
            "privacy=client_level beside secure=secagg": UNCOVERED,
        },
        reads=(
            "evaluate.share",
            "evaluate.clients_every",
            "evaluate.personal",
            "privacy.measure_noise",
            "privacy.measure_bound",
        ),
    )
    def _asks_clients(self) -> str:
        return f"evaluate.clients={self.clients}" if self.by_clients else ""

    @Feature(
        "evaluate.generate",
        instead="evaluate.generate=null",
        avoids={"data of numbers": "they hold no prompts"},
        reads=("evaluate.answers", "evaluate.new_tokens", "evaluate.shown"),
    )
    def _generates(self) -> bool:
        return self.generate is not None

    @Feature(
        "evaluate.choices",
        instead="evaluate.choices=null",
        avoids={"data of numbers": "they hold no questions"},
        reads=("data.choices",),
    )
    def _asks_choices(self) -> bool:
        return self.choices is not None

    @property
    def portion(self) -> float | None:
        """Return the share of its samples that each client holds out; None: nothing."""
        share = HELD_OUT if self.share is None else self.share
        return share if self.by_clients else None

    @property
    def source(self) -> dict[str, Any]:
        """Return where evaluation samples are from: the split, and whether clients have a test."""
        return {"split": self.split, "own_tests": self.share is None and self.split == "test"}


STOPPED_BY = OneOf(MEASURED, others=True)  # what a run measures besides


@dataclass(frozen=True)
class StopConfig(Limited, group="stop"):
    """Early stopping: when a run ends because a metric no longer improves.

    Attributes:
        metric: A metric of the validation split (data.validation), or of the clients
            (evaluate.clients), such as clients.accuracy.worst10.
        patience: Evaluations without improvement after which a run ends; None: never.
        min_delta: How much better than its best value the metric must be to count as improved.
    """

    metric: Annotated[str, STOPPED_BY] = "loss"
    patience: Count | None = None
    min_delta: NotNegative = 0.0

    @Feature(
        "stop.metric of clients",
        instead="a metric of the server as stop.metric",
        requires={"clients that measure": "they compute that metric"},
    )
    def _stops_by_clients(self) -> bool:
        return self.patience is not None and self.metric.startswith("clients.")

    @Feature("stop.patience", reads=("stop.metric", "stop.min_delta"))
    def _stops_early(self) -> bool:
        return self.patience is not None


@dataclass(frozen=True)
class PretrainConfig(Limited, group="pretrain"):
    """Central training of the initial weights, with AdamW; none with 0 epochs.

    Attributes:
        labels: Classes to pretrain on; None: all.
        epochs: Passes over their samples; 0: none.
        lr: Learning rate of AdamW.
        batch_size: Samples in a step.
    """

    labels: list[int] | None = None
    epochs: Whole = 0
    lr: Positive = 1e-3
    batch_size: Count = 64

    @Feature(
        "pretraining",
        instead="pretrain=none",
        take="pretrain.epochs above 0 (pretrain=none leaves all of it out)",
        reads=("pretrain.labels", "pretrain.lr", "pretrain.batch_size"),
    )
    def _pretrains(self) -> bool:
        return self.epochs > 0
