"""Build a task from checked settings: data, partition, model, pretraining, device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits

from fedraclora.attacks import AttackedOwnTrainer, AttackedTrainer
from fedraclora.binding import Plain, bind, object_of, section, without
from fedraclora.config.pretraining import pretrain_model
from fedraclora.config.run_config import TaskConfig
from fedraclora.config.settings import EvaluateConfig, WaitPolicy
from fedraclora.config.table_rows import selection_of, split_group
from fedraclora.data import DATASETS, DataSet, hold_out, select_labels
from fedraclora.data.client_split import hold_out_of_clients, numbered, without_held
from fedraclora.data.clients import ClientData, PartitionedData, count_labels
from fedraclora.data.dataset import Division
from fedraclora.data.duplicates import RowSubset, check_duplicates
from fedraclora.data.encoders.array import SampleSpec
from fedraclora.data.encoders.array_reader import ArrayReader
from fedraclora.data.gguf_header import read_gguf_header
from fedraclora.data.locate import GGUF, resolve
from fedraclora.data.objective import count_classes, judged_by, refuse_contradiction, with_labels
from fedraclora.data.partition import make_partition
from fedraclora.data.per_client import counted
from fedraclora.data.samples import Samples
from fedraclora.data.similar_names import with_clear_names
from fedraclora.data.task import LOSSES, HeldOutSamples, Task
from fedraclora.errors import ConfigError
from fedraclora.evaluation.generate import GreedyGeneration
from fedraclora.evaluation.metrics import Measure
from fedraclora.imports import check_call
from fedraclora.models import BuiltModel, check_fit
from fedraclora.models.outputs import is_softmax, probe
from fedraclora.models.pretrained import assumed
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.secagg import LEAST_CLIENTS, SecAgg, SecAggTerms
from fedraclora.protocol.cohorts import check_cohort, cohort_size
from fedraclora.protocol.method import Plan
from fedraclora.protocol.plan import make_plan
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.memory import keep_freed_memory
from fedraclora.training.own.trainer import OwnTrainer

# Trainer classes with and without attackers: the project's loop, and a user's function.
KINDS: tuple[tuple[type[AttackedTrainer], type[CohortTrainer]], ...] = (
    (AttackedTrainer, CohortTrainer),
    (AttackedOwnTrainer, OwnTrainer),
)


# Keys of data that name the source of samples.
SOURCES = ("file", "test_file", "test_function", "samples", "function")


@dataclass(frozen=True)
class PreparedTask:
    """Hold a task on its device, with the numbers that the training loop needs.

    Attributes:
        task: The task.
        clients: Size of the population, after empty clients are dropped.
        cohort: Clients per round.
        classes: Number of labels of the samples; 0 if they have none.
        device: Where training runs.
    """

    task: Task
    clients: int
    cohort: int
    classes: int
    device: torch.device

    def label_counts(self, clients: torch.Tensor) -> npt.NDArray[np.int64]:
        """Count the samples of each label at some clients: ids [K] -> [K, classes]."""
        return count_labels(self.task.train, clients.to(self.device), self.classes)


def resolved(plain: Plain) -> dict[str, object]:
    """Fill in settings derived from the clients' data, for processes that have only one client's.

    Args:
        plain: The config of a new run.

    Returns:
        The config, with the number of clients, and the shape and classes of their samples.

    Raises:
        FedRacLoraError: If the samples are missing or wrong, or do not determine these.
    """
    data = section(plain, "data")
    if data.get("name") != "own":
        return dict(plain)
    samples, clients = data.get("samples"), plain.get("clients")
    if clients is None:
        clients = counted(samples if isinstance(samples, str) else None, None)
    data["clients"] = clients
    if data.get("classes") is None or data.get("shape") is None:
        own, _ = split_group("data", data)
        known = bind("data", DATASETS, without(own, "served"))()  # each node sets it
        data |= {"classes": known.classes, "shape": [*known.sample_shape]}
    return {**plain, "data": data, "clients": clients}


def trainer_of(config: TaskConfig, built: PreparedTask, plan: Plan) -> CohortTrainer:
    """Create the trainer of a run's clients, the same in every process."""
    task, attack = built.task, config.attack
    task = replace(task, train=attack.poisoned(task.train, built.classes, config.seed))
    local = config.local
    given: dict[str, Any] = {"seed": config.seed, "device": built.device}
    if local.train is None:
        given |= {"precision": config.precision}
    else:
        said, at = local.parameters or {}, "local.parameters"
        function = object_of("local.train", local.train, parameters=said, at=at)
        check_call(f"local.train={local.train.partition('@')[0]}", function, "a round")
        given |= {"function": function, "name": local.train}
        given["timeout"] = local.timeout
        given["most"] = getattr(config.engine, "max_samples", WaitPolicy.max_samples)
    attacked, plain = KINDS[local.train is not None]
    if attack.share:
        return attacked(task, plan, local, **given, attack=attack)
    return plain(task, plan, local, **given)


def terms_of(config: TaskConfig, built: PreparedTask) -> SecAggTerms | None:
    """Create the conditions of clients for secure aggregation; None without it."""
    if not isinstance(config.secure, SecAgg):
        return None
    if config.system.enabled or isinstance(config.privacy, ClientLevel):
        # the number of asked clients depends on devices, or on random sampling
        fewest = LEAST_CLIENTS
    else:
        fewest = config.engine.fewest(built.cohort, config.max_failures)
    return SecAggTerms(
        config.secure,
        config.aggregation_weights,
        max(LEAST_CLIENTS, fewest),
        config.evaluate.min_clients,
        counted=not isinstance(config.privacy, ClientLevel),
    )


def pick_device(name: str) -> torch.device:
    """Resolve ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: If CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but this PyTorch finds no GPU; use device=auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def fix_bits(threads: int, device: torch.device) -> None:
    """Make results reproducible: fix the threads of torch and BLAS, and the kernels of a GPU.

    Every process that trains calls this once; from then on it also keeps freed memory.
    """
    keep_freed_memory()
    torch.set_num_threads(threads)
    threadpool_limits(limits=threads)
    # The fast path of torch's transformer blocks has no gradient and rounds differently.
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        # Fused attention sums gradients in no fixed order.
        torch.backends.cuda.enable_flash_sdp(enabled=False)
        torch.backends.cuda.enable_mem_efficient_sdp(enabled=False)
        torch.backends.cuda.enable_cudnn_sdp(enabled=False)


def plan_of(config: TaskConfig, task: Task) -> Plan:
    """Choose which layers are adapted and which are trained in full.

    Raises:
        ConfigError: If a head is to be trained in full, and the model has none.
    """
    if config.head == "full" and not task.head:
        raise ConfigError(
            "head=full trains the final layer in full, but no head was found in this model. Set "
            "head=lora, or name the layer with model.head=[NAME]."
        )
    return make_plan(
        task.model,
        task.head,
        target_modules=task.targets if config.target_modules is None else config.target_modules,
        head_policy=config.head,
        bias_policy=config.bias,
        modules_to_save=config.modules_to_save,
        exclude_modules=config.exclude_modules,
    )


def build_task(config: TaskConfig) -> PreparedTask:
    """Load the data, divide it, build the model, and pretrain it if asked.

    Args:
        config: Checked settings.

    Returns:
        The task and its sizes.

    Raises:
        FedRacLoraError: If data, partition, model or number of clients are wrong.
    """
    device = pick_device(config.device)
    selection, own_metrics = selection_of(config.data), config.data.get("metrics")
    whole = judged_by(
        config.data(clients=config.clients, seed=config.seed),
        selection.loss,
        own_metrics or selection.metrics,
    )
    whole = with_clear_names(numbered(whole) if config.evaluate.by_clients else whole)
    chosen = selection.labels
    data = whole if chosen is None else select_labels(with_labels(whole), chosen)
    data, validation = hold_out(data, selection.validation, config.seed)
    division: dict[str, Any] = dict(config.partition.group)
    parts, info = make_partition(data, **division, clients=config.clients, seed=config.seed)
    train = _clients(data, parts)
    if train.elsewhere:  # their number is not known
        info = {key: fact for key, fact in info.items() if not key.startswith("samples_")}
    built = config.model(shape=data.sample_shape, classes=data.classes, seed=config.seed)
    seen = [data.train, *train.seen]
    tables = [table for table in (*seen, data.test) if len(table) and table.inputs]
    for table in tables:
        check_fit(built.model, table.inputs)
    floats = (t.dtype for t in data.train.inputs.values() if t.is_floating_point())
    dtype = next(floats, torch.float32)  # token ids have none
    model, facts = _converted(built, dtype)
    if tables:
        data = probe(
            model,
            tables[0],
            data,
            device,
            own_model=config.own_model,
            own_loop=config.local.is_own,
        )
    facts |= {**data.info, "partition": info}
    facts |= {"tests_of_clients": sum(t is not None for t in data.tests)} if data.tests else {}
    facts |= {"train": len(data.train)} if len(data.train) else {}
    facts |= {"test": len(data.test), "validation": len(validation or ())}
    facts |= _said_of_weights(config) | _said_of_loss(config, data, model, tables)
    if built.drawn:
        facts["new_head"] = (
            f"{', '.join(built.drawn)}: initialized at random, since model.path has no head of "
            "this size"
        )
    asked = config.evaluate
    train, held = hold_out_of_clients(train, asked.portion, config.seed, **asked.source)
    trained = RowSubset.of(train) or [RowSubset(table) for table in seen]
    facts |= _duplicates(config, data, trained, validation, held, selection.duplicates)
    if config.pretrain.epochs:
        facts["pretrain"] = pretrain_model(config, without_held(whole, data, held), model)
    clients = train.num_clients
    size = cohort_size(config.clients_per_round, clients)
    _check_sizes(size, clients, config.system.buffer)
    task = Task(
        model=model.to(device),
        head=built.head,
        loss=data.loss,
        metrics=data.metrics,
        train=train.to(device),
        test=data.test.clone().to(device),
        validation=None if validation is None else validation.clone().to(device),
        targets=built.targets,
        optimum=data.optimum if held is None else None,  # its optimum is over all samples
        tokenizer=data.tokenizer,
        info=facts,
        reading=({"shape": [*data.sample_shape]} if data.sample_shape else {}) | data.reading,
        reader=data.reader or _array_reader(config, data),
        like=data.like,
        brought=train.object_of if train.brings_objects else None,
        held=None if held is None else HeldOutSamples(held.to(device), asked.batch_size),
        choices=asked.choices,
    )
    return PreparedTask(task, clients, size, count_classes(data), device)


def _duplicates(
    config: TaskConfig,
    data: DataSet,
    train: Sequence[RowSubset],
    validation: Samples | None,
    held: ClientData | None,
    asked: str,
) -> dict[str, object]:
    """Count samples in both training and evaluation data; raises like `check_duplicates`."""
    named = {k: v for k, v in config.data.group.items() if isinstance(v, str) and k in SOURCES}
    source = ", ".join(f"data.{key}={value}" for key, value in named.items())
    tests = {
        # Otherwise the metric is the training objective.
        "test samples": [] if data.test is data.train else [RowSubset(data.test)],
        "validation samples": [] if validation is None else [RowSubset(validation)],
        "samples that clients are evaluated on": RowSubset.of(held),
    }
    source = source or f"data={config.data.name}"
    found = check_duplicates(train, tests, source, keep=asked == "keep")
    return {"duplicates": found} if found else {}


def _clients(data: DataSet, parts: Division) -> ClientData:
    """Combine the rows of clients with their table, and with the clients' objects."""
    if not isinstance(parts, list):
        return parts
    return PartitionedData.of(data.train, parts, entries=data.entries, own_tests=data.tests)


def _said_of_loss(
    config: TaskConfig, data: DataSet, model: torch.nn.Module, tables: Sequence[Samples]
) -> dict[str, object]:
    """Describe the loss and its source; empty for the project's own data sets."""
    said = {key: config.data.get(key) for key in ("loss", "task")}
    told = [f"data.{key}={value}" for key, value in said.items() if value is not None]
    source = data.info.get("loss_from") or [*told, f"of data={config.data.name}"][0]
    learnt = tables or config.local.train is None  # otherwise the user's function has its own loss
    warnings = [refuse_contradiction(model, data.loss)] if config.own_model and learnt else []
    logits = config.own_model and data.loss in LOSSES and tables
    if logits and is_softmax(model, tables[-1], data.loss):
        warnings.append(
            f"the outputs of the model are probabilities, as after a softmax, but {data.loss} "
            "needs logits: leave the softmax out"
        )
    target = data.test.target
    if "auc" in data.metrics and len(target) and bool((target == target[:1]).all()):
        warnings.append("auc is nan: all test samples have the same target")
    warning = "; ".join(filter(None, warnings))
    found = {"loss": data.loss, "loss_from": source, "metrics": [*data.metrics]}
    found |= {"outputs_as": data.like} if data.like else {}
    if lower := Measure.of(data.metrics, data.loss, data.like).lower:
        found["lower_is_better"] = lower
    return found | ({"loss_warning": warning} if warning else {})


def _array_reader(config: TaskConfig, data: DataSet) -> ArrayReader:
    """Create the reader of new samples for data that are arrays."""
    # otherwise the model decides what fits
    classes = data.classes if "label" in data.columns else None
    form = SampleSpec(tuple(data.sample_shape), data.like or data.loss, classes)
    return ArrayReader(form, numbered=config.data.name == "object")


def _check_sizes(cohort: int, clients: int, buffer: int | None) -> None:
    """Reject a reply buffer that is larger than the number of clients."""
    check_cohort(cohort, clients)
    if buffer is not None and buffer > clients:
        raise ConfigError(
            f"system.buffer={buffer}, but there are only {clients} clients, and a step takes at "
            "most one reply of each. Lower it (clients_per_round is how many train at a time)."
        )


def _said_of_weights(config: TaskConfig) -> dict[str, object]:
    """Note that the weights of a GGUF file were quantized."""
    path = config.model.get("path")
    if not isinstance(path, str) or not path.endswith(GGUF):
        return {}
    header = read_gguf_header(resolve(path, key="model.path"), "model.path")
    found = [f"{header.kinds} in {Path(path).name}, de-quantized to float32", *assumed(header)]
    return {"weights": "; ".join(found)}


def _converted(built: BuiltModel, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, object]]:
    """Convert a model to the run's number format, and note weights that had another."""
    if built.narrow:
        return built.model, {}
    others = sorted({str(p.dtype)[6:] for p in built.model.parameters() if p.dtype != dtype})
    kind, to = type(built.model).__name__, str(dtype)[6:]
    said = f"{kind} has {' and '.join(others)} weights, converted to {to} for the whole run"
    return built.model.to(dtype), {"precision": said} if others else {}


def answering_of(asked: EvaluateConfig, task: Task, samples: Samples) -> GreedyGeneration | None:
    """Create the generator of answers of a language model; None if evaluate.generate is not set."""
    if asked.generate is None:
        return None
    return GreedyGeneration(
        task.model,
        task.tokenizer,
        samples,
        every=asked.generate,
        count=asked.answers,
        new_tokens=asked.new_tokens,
        shown=asked.shown,
        batch_size=asked.batch_size,
    )


def measured_samples(task: Task, split: str) -> Samples:
    """Return the samples that the server evaluates on.

    Raises:
        ConfigError: If the validation split is asked for and there is none.
    """
    if split == "test":
        return task.test
    if task.validation is None and task.held is not None:  # clients have some
        return task.test.mapped(itemgetter(slice(0)))
    if task.validation is None:
        raise ConfigError(
            "the validation split is used, but data.validation=0 makes none. Set it above 0, or "
            "evaluate on test (evaluate.split, --data) without stop.patience."
        )
    return task.validation
