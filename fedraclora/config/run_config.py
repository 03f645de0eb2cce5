"""Turn a plain nested dict (a resolved Hydra config) into checked, frozen settings.

Each group of the config names a row of a table (``method.name``, ``data.name``, ...). Its other
keys must be the keyword arguments of that row: signatures are the schema, so a wrong key, type or
name is refused here, with the names that exist and the nearest one.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property
from typing import Annotated, Any

from fedraclora.aggregation.base import Aggregator
from fedraclora.aggregation.robust import AGGREGATORS
from fedraclora.aggregation.server_optimizers import SERVER_OPTIMIZERS, ServerOptimizer
from fedraclora.allocation import ALLOCATIONS, Uniform
from fedraclora.attacks import ATTACKS, Attack
from fedraclora.binding import Plain, bind, build, row_of, section, without
from fedraclora.compatibility import Feature
from fedraclora.config.resuming import free_keys
from fedraclora.config.settings import (
    ENGINES,
    CompressionConfig,
    DeployConfig,
    EngineConfig,
    EvaluateConfig,
    OutputConfig,
    PretrainConfig,
    StopConfig,
)
from fedraclora.config.table_rows import BESIDE, TABLES, TableRow, split_group
from fedraclora.config.titles import method_label, run_title
from fedraclora.config.unread import refuse_conflicts, refuse_misfits, refuse_unknown
from fedraclora.data import DataSet
from fedraclora.data.dataset import BY_COLUMN, Division
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import MissingKeysError
from fedraclora.limits import AddedKey, Count, Limit, Limited, OneOf, Whole, later_keys
from fedraclora.lowrank.dora import DORA
from fedraclora.models import BuiltModel
from fedraclora.object_registry import NAME, code_digests, is_named, named_by, registered_object
from fedraclora.privacy.client_level import PRIVACIES, ClientLevel, Privacy
from fedraclora.privacy.secagg import SECURES, Open, SecAgg
from fedraclora.protocol.cohorts import WEIGHTINGS, share_of
from fedraclora.protocol.method import KEPT_BY_CLIENTS, Method, check_method
from fedraclora.protocol.plan import BIAS_POLICIES, HEAD_POLICIES
from fedraclora.schema import checked_values
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.precision import FLOAT32, PRECISIONS

KEEPS_HEADS = Feature("head=personal", instead="head=full, lora or frozen")
DEVICES = ("auto", "cpu", "cuda")
ClientsPerRound = Annotated[
    int | str,
    Limit(
        "a number of clients, or a share of them as 10%,",
        lambda value: value >= 1 if isinstance(value, int) else share_of(value) is not None,
    ),
]
NOT_IN_DIGEST = ("output", "resume", "callbacks")
# Settings of an engine that influence the result: not the place or number of its workers.
ENGINE_IN_DIGEST = ("chunk", "threads")


def digested(plain: Plain, methods: Mapping[str, type[Method]]) -> dict[str, object]:
    """Return the part of a config that determines the result, without data paths and output.

    Keys that older configs lack (`limits.AddedKey`) are left out at their defaults.
    """
    kept = {k: v for k, v in plain.items() if k not in NOT_IN_DIGEST}
    if isinstance(data := kept.get("data"), Mapping):
        # The digest of a program's samples includes loss and metrics, too.
        beside = ("loss", "metrics") if data.get("name") == NAME else ()
        kept["data"] = without(data, "root", *beside)
    if isinstance(engine := kept.get("engine"), Mapping):
        kept["engine"] = {k: v for k, v in engine.items() if k in ENGINE_IN_DIGEST}
    if isinstance(begun := kept.get("init_from"), Mapping):
        kept["init_from"] = without(begun, "path")
    tables: dict[str, Mapping[str, Callable[..., object]]]
    tables = {**TABLES, **ROWS, "method": methods}
    for group, keys in kept.items():
        if isinstance(keys, Mapping):
            name = str(keys.get("name"))
            row = tables[group].get(name) if group in tables else KINDS.get(group)
            read, other = split_group(group, section(kept, group))
            read = _as_before(row, read) if row and name != NAME else read
            kept[group] = read | (_as_before(BESIDE[group][0], other) if other else {})
    return _as_before(RunConfig, kept)


def _as_before(home: Callable[..., object], keys: Plain) -> dict[str, object]:
    """Leave out keys at their defaults that older configs lack."""
    later = dict(later_keys(home))
    for key, default in later.items():
        if is_dataclass(default) and not isinstance(default, type):  # a group
            named = {"name": default.name} if hasattr(default, "name") else {}
            set_ = without(vars(default), *later_keys(type(default)))
            later[key] = named | {k: [*v] if isinstance(v, tuple) else v for k, v in set_.items()}
    return {k: v for k, v in keys.items() if k not in later or v != later[k]}


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Limited):
    """Settings that every training process needs: data, model and local training.

    Attributes:
        plain: The dict from which it was read, to write it again: ``config.yaml``, and for other
            processes and programs. All else reads the settings.
        data, partition, model: Rows of tables with their arguments, called once data are read.
        local, engine, pretrain: Settings.
        attack: What malicious clients do, in a simulation.
        privacy, secure: Differential privacy, and secure aggregation.
        system: Simulated devices of the clients.
        clients: Number of clients; None if the data are divided already.
        clients_per_round: Clients sampled for a round: a number, or a share of all such as 10%.
        seed: Seed of the run.
        device: auto, cpu or cuda.
        precision: Number format of local training: float32, or bf16-mixed (matrix products in
            bfloat16).
        aggregation_weights: Clients' weights in the mean: samples (how many a client trains on) or
            uniform.
        head: Final layer: lora (adapted), full (trained in full and averaged), frozen, or personal
            (each client keeps its own).
        bias: Biases of adapted layers: full or frozen (for other layers see modules_to_save).
        target_modules: Adapted layers: None (the model's default), all-linear, all, or
            [query,value].
        modules_to_save: Further layers trained in full, by pattern: [conv*, LayerNorm].
        exclude_modules: Layers left out, by pattern: neither adapted nor trained.
        max_failures: How many clients may fail in a round before the run stops.
        evaluate: When and on which samples the server and the clients evaluate.
    """

    plain: Plain
    data: TableRow[DataSet]
    partition: TableRow[Division]
    model: TableRow[BuiltModel]
    local: LocalSettings
    engine: EngineConfig
    pretrain: PretrainConfig
    attack: Attack
    privacy: Privacy
    secure: Open
    system: SystemConfig
    clients: Count | None = 200
    clients_per_round: ClientsPerRound = 20
    seed: int = 0
    device: Annotated[str, OneOf(DEVICES)] = "auto"
    precision: Annotated[str, OneOf(PRECISIONS)] = "float32"
    aggregation_weights: Annotated[str, OneOf(WEIGHTINGS)] = "samples"
    head: Annotated[str, OneOf(HEAD_POLICIES)] = "lora"
    bias: Annotated[str, OneOf(BIAS_POLICIES)] = "full"
    target_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    exclude_modules: Annotated[str | list[str] | None, AddedKey()] = None
    max_failures: Whole = 0
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @cached_property
    def choices(self) -> Mapping[str, str]:
        """Return the choice made in each group, by name: a class may have several."""
        groups = {key: group for key, group in self.plain.items() if isinstance(group, Mapping)}
        return {key: str(group["name"]) for key, group in groups.items() if "name" in group}

    @property
    def registered_for_clients(self) -> dict[str, Any]:
        """Return the Python program's objects for clients, by their names in the config."""
        judges = {key: self.data.get(key) for key in ("loss", "metrics")}
        return named_by({"local": self.plain.get("local"), **judges})

    @property
    def veiled(self) -> bool:
        """Return whether secure aggregation or noise hides the metrics of single clients."""
        return isinstance(self.secure, SecAgg) or isinstance(self.privacy, ClientLevel)

    @property
    def own_model(self) -> bool:
        """Return whether the model is a user's own."""
        return self.model.name in {"function", "object"}

    # Features that depend on two groups of the config.

    @Feature("precision=float32", instead="precision=bf16-mixed")
    def _is_full(self) -> bool:
        return self.precision == FLOAT32 and not self.local.is_own

    @Feature("data.validation", instead="data.validation=0")
    def _validates(self) -> str:
        share = self.data.get("validation")
        return f"data.validation={share}" if share else ""

    @Feature(
        "data.labels",
        instead="data.labels=null",
        avoids={
            "data without classes": "there are no classes to keep",
            "clients that bring their own samples": "the server does not hold their samples",
        },
    )
    def _selects_labels(self) -> bool:
        return self.data.get("labels") is not None

    @Feature("precision=bf16-mixed", instead="precision=float32")
    def _is_mixed(self) -> str:
        return f"precision={self.precision}" if self.precision != FLOAT32 else ""

    @Feature("max_failures", instead="max_failures=0")
    def _allows_failures(self) -> str:
        return f"max_failures={self.max_failures}" if self.max_failures else ""

    @KEPT_BY_CLIENTS
    @KEEPS_HEADS
    def _keeps_heads(self) -> bool:
        return self.head == "personal"

    @Feature(
        "head=personal that the server measures",
        instead="evaluate.clients=round, head=lora, full or frozen",
    )
    def _measures_heads(self) -> bool:
        return self._keeps_heads() and not self.evaluate.by_clients

    @Feature(
        "layers trained in full",
        take="layers trained in full (head=full, head=personal, bias=full, modules_to_save)",
        reads=("local.full_lr",),
    )
    def _trains_in_full(self) -> bool:
        return bool(
            self.head in {"full", "personal"} or self.bias == "full" or self.modules_to_save
        )

    @Feature(
        "clients that measure under secure aggregation or privacy",
        take="clients that measure under secure=secagg or privacy=client_level",
        reads=("evaluate.min_clients",),
    )
    def _veils_measurements(self) -> bool:
        return self.evaluate.by_clients and self.veiled

    @Feature(
        "clients that train as one batch",
        take="batches of clients, but with local=own your function trains one client at a time",
        reads=("engine.chunk",),
    )
    def _batches_clients(self) -> bool:
        return not self.local.is_own or self.engine.chunk == 1

    @BY_COLUMN
    def _divides_by_own(self) -> bool:
        return is_named(self.partition.name)  # a partition of the user's gets all columns

    @Feature("privacy=client_level beside secure=secagg", instead="secure=none")
    def _hides_sums(self) -> bool:
        return isinstance(self.privacy, ClientLevel) and isinstance(self.secure, SecAgg)

    @Feature(
        "a deployment whose clients answer a round only once",
        instead="secure=none, local.dp=null",
        avoids={
            "output.checkpoint_every above 1": (
                "a server that restarts from an older round could not ask its clients again"
            ),
        },
    )
    def _answers_once(self) -> bool:
        once = isinstance(self.secure, SecAgg) or self.local.answers_once
        return once and isinstance(self.engine, DeployConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig(TaskConfig):
    """All settings of a run.

    Attributes:
        method: The method, its hyperparameters checked.
        allocation: Rank allocation: which layers are adapted, at which rank.
        output: What the run writes.
        aggregator: How the updates are combined, for example robustly, before the method sees them.
        server_optimizer: How the server applies the mean update of a round.
        rounds: Rounds.
        control_variates: Correct each client's gradients for client drift (SCAFFOLD); needs
            local.steps.
        dora: Give every adapted row a trained magnitude of its own (DoRA).
        init_from: The folder of a finished run or of a PEFT adapter whose weights the run starts
            from; None: those of its model. (A run keeps its ``path`` and checksum ``sha256``.)
        resume: A run folder to resume; auto: the run's own folder, if it exists.
        stop: Early stopping.
        compression: How updates are quantized on their way up and down.
        steps: Your own steps of a round: `fedraclora.RoundStep` by module:name, with parameters
            {name: module:name, key: value}; or a description of objects that a Python program
            passed.
        callbacks: Your `fedraclora.Callback` objects that watch the run, given in the same way.
    """

    method: Method
    allocation: Uniform = field(default_factory=Uniform)
    output: OutputConfig
    aggregator: Aggregator
    server_optimizer: ServerOptimizer
    rounds: Whole = 150
    control_variates: bool = False
    dora: bool = False
    init_from: str | dict[str, str] | None = None
    resume: str | None = None
    stop: StopConfig = field(default_factory=StopConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    steps: list[str | dict[str, object]] = field(default_factory=list)
    callbacks: list[str | dict[str, object]] = field(default_factory=list)

    @property
    def digested(self) -> dict[str, object]:
        """The part of the config that decides the result."""
        return digested(self.plain, {self.choices["method"]: type(self.method)})

    @property
    def free_keys(self) -> tuple[str, ...]:
        """The dotted keys that may change when the run is resumed."""
        return free_keys(self.plain)

    @property
    def code(self) -> dict[str, str]:
        """Digests of the code of a user's that the config names, by its name there."""
        return code_digests(self.plain)

    @property
    def label(self) -> str:
        """The run in one or two words."""
        return method_label(self.plain)

    @property
    def title(self) -> str:
        """The run in a line: method, data and division, step size, seed."""
        return run_title(self.plain)

    def at_rate(self, rate: float) -> RunConfig:
        """Return the config with a number in the place of ``local.lr``, as if it had been typed."""
        plain = {**self.plain, "local": {**section(self.plain, "local"), "lr": rate}}
        return replace(self, local=replace(self.local, lr=rate), plain=plain)

    @DORA
    def _trains_lengths(self) -> bool:
        return self.dora

    @Feature("local.steps below method.steps", instead="local.steps=null, or more of them")
    def _takes_fewer_steps(self) -> str:
        taken, most = self.local.steps, self.method.most_steps
        return f"local.steps={taken}" if taken and most and taken < most else ""

    @Feature(
        "init_from",
        instead="init_from=null",
        avoids={"pretraining": "the pretrained weights would be replaced"},
    )
    def _begins_from_run(self) -> bool:
        return self.init_from is not None

    @Feature(
        "a method that merges",
        take="methods that merge (method.merge_every), but this one never does",
        reads=("local.optimizer_state_kept",),
    )
    def _ends_links(self) -> bool:
        # Of an allocation: components are cut, and those that stay are other ones.
        return type(self.allocation) is not Uniform or self.method.link_rounds is not None


# Groups that choose a row of a table: functions called at once, and functions that wait for data.
ROWS: dict[str, Mapping[str, Callable[..., object]]] = {
    "allocation": ALLOCATIONS,
    "engine": ENGINES,
    "aggregator": AGGREGATORS,
    "server_optimizer": SERVER_OPTIMIZERS,
    "privacy": PRIVACIES,
    "secure": SECURES,
    "attack": ATTACKS,
}
# Groups with one class each (the other dataclasses); a name selects a file.
KINDS: dict[str, Callable[..., object]] = {
    key: kind
    for key, kind in typing.get_type_hints(RunConfig).items()
    if isinstance(kind, type) and is_dataclass(kind) and key not in ROWS
}
# Those that are groups, and their neutral choice.
NAMED = {"local": "sgd", "pretrain": "none", "output": "run", "system": "none"}
SECTIONS = {key: kind for key, kind in KINDS.items() if key not in {*NAMED, "method"}}


def task_from_plain(plain: Plain) -> TaskConfig:
    """Build checked settings from the part of a config that clients need.

    Raises:
        ConfigError: Naming the key, its value and the expected one.
    """
    return TaskConfig(**_fields(TaskConfig, plain))  # type: ignore[arg-type]


def from_plain(
    plain: Plain, methods: Mapping[str, type[Method]], *, resuming: bool = False
) -> RunConfig:
    """Build checked settings from a plain config.

    Args:
        plain: Nested dict of plain values (`fedraclora simulate --cfg job` prints all).
        methods: The METHODS table of `strategies`, passed in since this module cannot import it.
        resuming: Whether it is the config of a resumed run, which an earlier version may have
            started: unused keys are then kept.

    Returns:
        The settings.

    Raises:
        ConfigError: Naming the key, what came and what was wanted.
    """
    if not resuming:
        refuse_unknown(plain, [*inspect.signature(RunConfig).parameters])
    group = section(plain, "method")
    if group.get("name") == NAME:
        method = registered_object("method", group.get("digest"))
    else:
        method = bind("method", methods, group)()
        if is_named(group["name"]):
            check_method(method)
    config = RunConfig(method=method, **_fields(RunConfig, plain))  # type: ignore[arg-type]
    refuse_misfits(config)
    refuse_conflicts(config, idle=not resuming)
    return config


def _fields(kind: type[TaskConfig], plain: Plain) -> dict[str, object]:
    """Read the fields of a config class, except the method, from the keys of their names.

    Raises:
        MissingKeysError: Naming all keys that are missing.
    """
    found: dict[str, object] = {"plain": plain}
    keys = [key for key in inspect.signature(kind).parameters if key not in {"plain", "method"}]
    later = later_keys(typing.cast("Callable[..., object]", kind))  # for mypy, kind has no hash
    missing = [key for key in keys if key not in plain and key not in later]
    hint = f"the config has no key {', '.join(missing)}; see `fedraclora simulate --cfg job`"
    errors = [hint] if missing else []
    for key in keys:
        if key not in plain:
            continue
        try:
            if key in KINDS:
                group, beside = section(plain, key), ("name",) if key in NAMED else ()
                own = key in NAMED and is_named(group.get("name"))
                target = row_of(key, {key: KINDS[key]}, group["name"]) if own else KINDS[key]
                found[key] = build(key, target, without(group, *beside))
            elif key in ROWS:
                found[key] = bind(key, ROWS[key], section(plain, key))()
            elif key in TABLES:
                found[key] = TableRow.checked(key, section(plain, key))
        except MissingKeysError as error:
            errors.append(str(error))
            missing += error.keys
    if missing:
        raise MissingKeysError("\n  ".join(errors), missing)
    alone = {key: plain[key] for key in keys if key in plain and key not in found}
    return found | checked_values("", kind, alone)


def targets_of(
    methods: Mapping[str, type[Method]],
) -> dict[str, Mapping[str, Callable[..., object]]]:
    """List the class or function behind each choice: group -> choice -> class or function.

    Args:
        methods: The METHODS table of `strategies`.
    """
    named = {group: {name: KINDS[group]} for group, name in NAMED.items()}
    return {**named, **TABLES, **ROWS, "method": methods}
