"""Register models, data and methods of a Python program under names in the config."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fedraclora.binding import OWN_GROUPS, PlainDict, section
from fedraclora.compose.overrides import key_of
from fedraclora.compose.values import pairs_of, plain_value
from fedraclora.config.run_config import targets_of
from fedraclora.data.dataset import DataSet
from fedraclora.data.encoders.program import is_columns, is_frame
from fedraclora.data.own_loss import short_name
from fedraclora.data.partitioners import by_partitioner
from fedraclora.data.sources.program import data_of, is_share, register_data
from fedraclora.data.sources.table import load_table
from fedraclora.errors import ConfigError
from fedraclora.evaluation.own_metrics import Metric
from fedraclora.models.custom import register_model, require_module
from fedraclora.object_registry import NAME, object_digest, register_object
from fedraclora.protocol.method import check_method
from fedraclora.schema import checked_values
from fedraclora.strategies.methods import METHODS
from fedraclora.training.localconfig import LocalConfig

TABLES = (".csv", ".tsv", ".tab", ".parquet")
# Choices whose keys an object has, too: words for these hold.
OF_DATA, OF_MODEL = ("data=own", "partition=auto"), ("model=function",)
OF_FRAME = ("data=table",)
FRAME_KEYS = ("features", "missing", "standardize", "test_fraction", "split_seed", "split")
OBJECT_KEYS = ("loss", "metrics", "classes")
KEPT = {"data": ("labels", "validation", "duplicates"), "model": ("head", "target_modules")}


@dataclass
class ProgramObjects:
    """Hold the objects of a program that a run uses, and their changes to its config.

    Attributes:
        words: Overrides that objects need, before those of the caller.
        keys: Choices that are not objects, unchanged.
        groups: Keys to set in the composed config, by group.
        data: Reads the samples after composition, which determines how rows of a frame are read;
            None: data are a choice.
        options: The caller's options for the samples.
        model: The program's module, which may name its loss; None: the model is a choice.
    """

    words: list[str] = field(default_factory=list)
    keys: dict[str, object] = field(default_factory=dict)
    groups: dict[str, PlainDict] = field(default_factory=dict)
    data: Callable[..., DataSet] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    model: object = None

    def put_into(self, plain: PlainDict, typed: Sequence[str]) -> PlainDict:
        """Put the objects into their groups of the composed config.

        Args:
            plain: The composed config.
            typed: The keys that the caller set.
        """
        found, groups = dict(plain), dict(self.groups)
        told = {group: keys for group, keys in self.keys.items() if isinstance(keys, Mapping)}
        twice = [k for k, _ in pairs_of(told) if "." in k and typed.count(k) > 1]
        if twice:
            raise ConfigError(
                f"{twice[0]} is given both as KEY=VALUE and as an argument of simulate: leave "
                "one out"
            )
        if self.data is not None:
            groups["data"] = register_data(self.data(**self._read(plain, typed) | self.options))
        for name, group in groups.items():
            if name in OWN_GROUPS and (said := [k for k in typed if k.partition(".")[0] == name]):
                raise ConfigError(
                    f"{said[0]} is given beside {name}=..., which is an object of your program: "
                    "set it on that object"
                )
            composed = plain.get(name)
            old = composed if isinstance(composed, Mapping) else {}
            kept = {key: old[key] for key in KEPT.get(name, ()) if key in old}
            found[name] = {"name": NAME, **kept, **group}
        return found

    def _read(self, plain: PlainDict, typed: Sequence[str]) -> dict[str, Any]:
        """Read the samples, with the options that the caller set in the config.

        Raises:
            ConfigError: If a key has no effect on samples of the program.
        """
        asked, frames = section(plain, "data"), set(OF_FRAME) <= {*self.words}
        frame = {k: asked[k] for k in FRAME_KEYS if k in asked}
        frame = checked_values("data", load_table, frame)  # which reads a file by the same keys
        said = {key.partition(".")[2] for key in typed if key.startswith("data.")}
        if asked.get("name") == NAME:  # a whole config, of a run with such samples
            said = {*OBJECT_KEYS} & {*asked}
        known = {*KEPT["data"], *(FRAME_KEYS if frames else OBJECT_KEYS)}
        if idle := sorted(said - known):
            raise ConfigError(
                f"data.{idle[0]} has no effect on samples of your program. Leave it out, or use "
                "the arguments of simulate (loss, metrics, test, client, target)."
            )
        model = self.model if self.model is not None else section(plain, "model").get("name")
        found = {key: asked[key] for key in OBJECT_KEYS if key in said}
        return found | {"frame": frame, "model": model}


def register_all(
    model: object,
    data: object,
    choices: dict[str, object],
    beside: Mapping[str, Any],
    *,
    whole: bool,
    own: bool = False,
) -> ProgramObjects:
    """Register objects; leave names and mappings to the config.

    Args:
        model: The argument of `fedraclora.api.simulate`; the others likewise.
        data: Of the clients.
        choices: Of `OWN_GROUPS`, which may be objects, too.
        beside: Options for data of the program, None if not given.
        whole: Whether they change a whole config, such as `RunResult.config`.
        own: Whether a user's function trains.

    Raises:
        ConfigError: If an object is of an unknown kind, or an option is given for data that are a
            choice.
        DataError: If samples are invalid.
    """
    objects, judged = (
        ProgramObjects(),
        register_loss_and_metrics(beside.get("loss"), beside.get("metrics")),
    )
    options = {key: value for key, value in beside.items() if value is not None} | judged
    divider = _divider(choices, data, options)
    for group, given in {"model": model, **choices}.items():
        _register_choice(objects, group, given)
    if isinstance(data, str | Path) and str(data).endswith(TABLES):
        objects.words.append("data=table")
        held_out = "test_fraction" if is_share(options.get("test")) else "test_file"
        names = {"client": "client", "target": "label", "test": held_out}
        names |= {key: key for key in judged}
        if unknown := [key for key in options if key not in names]:
            raise ConfigError(
                f"{unknown[0]}=... does not apply to a file of rows: set data.task instead"
            )
        objects.keys["data"] = {"file": str(data)} | {names[k]: v for k, v in options.items()}
    elif isinstance(data, Mapping) and hasattr(data, "column_names"):
        raise ConfigError(
            f"data is a {type(data).__name__} with the splits {list(data)}; give one as data=... "
            "and another as test=..."
        )
    elif isinstance(data, str | Path) and str(data).endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(
            f"data={data} is a file of conversations: write "
            f"data={{'name': 'instructions', 'file': {str(data)!r}, 'client': COLUMN}} "
            "(docs/language-models.md)"
        )
    elif data is None or isinstance(data, str) or is_choice(data):
        if beyond := [key for key in options if key not in judged]:
            raise ConfigError(
                f"{', '.join(beyond)}: these apply to data of your program, but data is "
                f"{'not given' if data is None else data!r}"
            )
        if data is None and "model" in objects.groups and not whole:
            raise ConfigError(
                "model is an object of your program, but there are no data: give the samples of "
                "the clients as data=..."
            )
        said = data if isinstance(data, Mapping) else {} if data is None else {"name": data}
        objects.keys |= {"data": {**said, **judged}} if judged else {"data": data} if said else {}
    else:
        words = OF_FRAME if is_frame(data) else OF_DATA
        objects.words += [word for word in words if key_of(word) not in objects.groups]
        objects.data = partial(data_of, data, partitioner=divider, own=own)
        objects.options = options
    return objects


def register_loss_and_metrics(loss: object, metrics: object) -> dict[str, Any]:
    """Register losses and metrics that are objects; return the names of all."""
    found = {"loss": register_object(loss) if callable(loss) else loss, "metrics": metrics}
    if callable(metrics) or isinstance(metrics, str | Mapping | list | tuple):
        listed = metrics if isinstance(metrics, list | tuple) else [metrics]
        found["metrics"] = [register_metric(each) if callable(each) else each for each in listed]
    return {key: value for key, value in found.items() if value is not None}


def register_metric(metric: Any) -> str:
    """Register a metric under its name in the ledger."""
    if not isinstance(metric, Metric):
        return register_object(metric)
    name = metric.name or short_name(register_object(metric.function))
    return register_object(metric, f"{name}@{object_digest(metric)}")


def is_choice(data: object) -> bool:
    """Distinguish a mapping of config keys from one of clients' samples."""
    kinds = (str, int, float, list, Mapping, Path, type(None))
    return isinstance(data, Mapping) and all(isinstance(value, kinds) for value in data.values())


def _divider(choices: dict[str, object], data: object, options: Mapping[str, object]) -> object:
    """Take out a partitioner that splits a ``Dataset`` by its own columns, before it is read."""
    partition = choices.get("partition")
    if "client" in options and not isinstance(partition, str | Mapping | None):
        raise ConfigError(
            f"partition is a {type(partition).__name__}, and client={options['client']!r} also "
            "names the client of each row: leave one of them out"
        )
    divides = hasattr(partition, "load_partition") and is_columns(data)
    return choices.pop("partition") if divides else None


def _register_choice(objects: ProgramObjects, group: str, given: object) -> None:
    """Write an object of a known class by its fields; register any other."""
    if given is None or isinstance(given, str | Mapping):
        objects.keys |= {} if given is None else {group: given}
        return
    if group == "model":
        objects.model = given
        objects.words += OF_MODEL
        objects.groups[group] = {"digest": register_model(require_module(given))}
        return
    if isinstance(given, type):
        raise ConfigError(
            f"{group} is the class {given.__name__}: give an instance, {given.__name__}(...)"
        )
    if group == "partition":
        divide = partial(by_partitioner, given) if hasattr(given, "load_partition") else given
        objects.groups[group] = {"name": register_object(divide)}
        return
    if not dataclasses.is_dataclass(given):
        raise ConfigError(
            f"{group}={given!r:.100}: give the name of a choice, a mapping of its keys, or an "
            "instance of its class"
        )
    known = [name for name, kind in targets_of(METHODS)[group].items() if type(given) is kind]
    known += ["sgd"] if type(given) is LocalConfig else []
    if group == "method" and not known:
        check_method(given)
        digest = hashlib.sha256(repr(given).encode()).hexdigest()[:32]
        objects.groups[group] = {"name": NAME, "digest": register_object(given, digest)}
        return
    fields = {f.name: getattr(given, f.name) for f in dataclasses.fields(given) if f.init}
    keys = {key: plain_value(f"{group}.{key}", value) for key, value in fields.items()}
    is_local = group == "local"  # its choices are files, of which none has all keys
    name = (
        register_object(type(given)) if not known else fields["optimizer"] if is_local else known[0]
    )
    where: dict[str, Any] = objects.keys if known and not is_local else objects.groups
    where[group] = {"name": name, **keys}


def trained_by(train: object, plain: PlainDict) -> PlainDict:
    """Put a training function of the program into a config.

    Args:
        train: A function, or ``module:function``; None: nothing is changed.
        plain: The config.

    Raises:
        ConfigError: If it is neither, or the config has other local training.
    """
    if train is None:
        return plain
    local = section(plain, "local")
    if local.get("name") != "own":
        raise ConfigError(
            f"local={local.get('name')}, but train=... is your own training (local=own): leave "
            "one of them out"
        )
    if not isinstance(train, str) and not callable(train):
        raise ConfigError(f"train={train!r:.100}: give a function that takes a round")
    train = train if isinstance(train, str) else register_object(train)
    return {**plain, "local": {**local, "train": train}}
