"""Models, data and methods of a Python program, as the config of a run names them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import getattr_static
from pathlib import Path
from typing import Any

from fedraclora.binding import coerce
from fedraclora.config.schema import PlainDict, section
from fedraclora.data.objects import is_columns, is_frame, is_share, lend_data
from fedraclora.data.own_loss import short_name
from fedraclora.data.tabular import load_table
from fedraclora.errors import ConfigError
from fedraclora.evaluation.own_metrics import Metric
from fedraclora.experiments.overrides import key_of
from fedraclora.experiments.values import plain_value, words_of
from fedraclora.limits import check_limits, hints
from fedraclora.models.objects import lend_model, require_module
from fedraclora.objects import NAME, fingerprint, lend
from fedraclora.protocol.method import Method, Traits
from fedraclora.strategies import METHODS

TABLES = (".csv", ".tsv", ".parquet")
# Choices whose keys an object has, too: words for these hold.
OF_DATA, OF_MODEL = ("data=own", "partition=auto"), ("model=function",)
OF_FRAME = ("data=table",)
FRAME_KEYS = ("features", "missing", "standardise", "test_share", "split_seed")
KINDS = hints(load_table)  # which reads a file by the same keys
OBJECT_KEYS = ("loss", "metrics", "classes")
KEPT = {"data": ("labels", "validation"), "model": ("head", "targets")}


@dataclass
class Lent:
    """What is lent for a run.

    Attributes:
        words: Words of the config that objects bring, before those of the caller.
        keys: Choices that are no objects, as they came.
        groups: What groups of the config become: keys laid over what was composed for them.
        data: Lends the samples, once the config has said how rows of a frame are read; None: data
            are a choice.
        options: What the caller said beside the samples.
        model: The module of the program, which may tell the loss; None: it is a choice.
    """

    words: list[str] = field(default_factory=list)
    keys: dict[str, object] = field(default_factory=dict)
    groups: dict[str, PlainDict] = field(default_factory=dict)
    data: Callable[..., dict[str, object]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    model: object = None

    def put_into(self, plain: PlainDict, typed: Sequence[str]) -> PlainDict:
        """Put the objects into their groups of the composed config.

        Args:
            plain: What was composed.
            typed: The keys that the caller said.
        """
        found, groups = dict(plain), dict(self.groups)
        told = {group: keys for group, keys in self.keys.items() if isinstance(keys, Mapping)}
        twice = [k for k in map(key_of, words_of(told)) if "." in k and typed.count(k) > 1]
        if twice:
            raise ConfigError(
                f"{twice[0]} is said in a word and by an argument of simulate: leave one out"
            )
        if self.data is not None:
            groups["data"] = self.data(**self._read(plain, typed) | self.options)
        for name, group in groups.items():
            composed = plain.get(name)
            old = composed if isinstance(composed, Mapping) else {}
            kept = {key: old[key] for key in KEPT.get(name, ()) if key in old}
            found[name] = {"name": NAME, **kept, **group}
        if "model" in groups and "model.head" not in typed:
            found["model"] = {**section(found, "model"), "head": None}  # it is looked for
        return found

    def _read(self, plain: PlainDict, typed: Sequence[str]) -> dict[str, Any]:
        """Read from the config what the caller has said of the samples there.

        Raises:
            ConfigError: If nothing reads a key beside samples of the program.
        """
        asked, frames = section(plain, "data"), set(OF_FRAME) <= {*self.words}
        frame = {k: coerce(f"data.{k}", asked[k], KINDS[k]) for k in FRAME_KEYS if k in asked}
        check_limits("data", load_table, frame)
        found: dict[str, Any] = {"frame": frame}
        said = {key.partition(".")[2] for key in typed if key.startswith("data.")}
        if asked.get("name") == NAME:  # a whole config, of a run with such samples
            said = {*OBJECT_KEYS} & {*asked}
        known = {*KEPT["data"], *(FRAME_KEYS if frames else OBJECT_KEYS)}
        if idle := sorted(said - known):
            raise ConfigError(
                f"data.{idle[0]} is not read beside samples of the program: leave it out, or say "
                "it in the arguments of simulate (loss, metrics, test, client, target)"
            )
        model = self.model if self.model is not None else section(plain, "model").get("name")
        found |= {key: asked[key] for key in OBJECT_KEYS if key in said}
        return found | {"model": model}


def lend_all(
    model: object,
    data: object,
    method: object,
    partition: object,
    beside: Mapping[str, Any],
    *,
    whole: bool,
    own: bool = False,
) -> Lent:
    """Lend what is an object; leave names and mappings to the config.

    Args:
        model: As `fedraclora.api.simulate` was given it, and so are the others.
        data: Of the clients.
        method: The algorithm.
        partition: How data are divided.
        beside: What goes with data of the program, None where it was not said.
        whole: Whether they are laid over a whole config, such as `Run.config`.
        own: Whether a function of the user's trains.

    Raises:
        ConfigError: If something is of no kind that is known, or is said of data that are a choice.
        DataError: If samples are not what they should be.
    """
    lent, judged = Lent(), lent_judges(beside.get("loss"), beside.get("metrics"))
    options = {key: value for key, value in beside.items() if value is not None} | judged
    partitioner = partition if hasattr(partition, "load_partition") else None
    if partitioner is not None and (not is_columns(data) or "client" in options):
        raise ConfigError(
            f"partition is a {type(partition).__name__}, which divides a Dataset of Hugging Face "
            f"that no column of clients divides; data is a {type(data).__name__}, client is "
            f"{options.get('client')!r}: leave one out, or give the name of a partition ('iid')"
        )
    if partition is not None and partitioner is None:
        lent.keys["partition"] = partition
    if model is not None and not isinstance(model, str | Mapping):
        lent.words += OF_MODEL
        lent.model = model
        lent.groups["model"] = {"digest": lend_model(require_module(model))}
    elif model is not None:
        lent.keys["model"] = model
    _lend_method(lent, method)
    if isinstance(data, str | Path) and str(data).endswith(TABLES):
        lent.words.append("data=table")
        held_out = "test_share" if is_share(options.get("test")) else "test"
        names = {"client": "client", "target": "label", "test": held_out}
        names |= {key: key for key in judged}
        if unknown := [key for key in options if key not in names]:
            raise ConfigError(f"{unknown[0]}=... is not for a file of rows; say data.task instead")
        lent.keys["data"] = {"file": str(data)} | {names[k]: v for k, v in options.items()}
    elif isinstance(data, Mapping) and hasattr(data, "column_names"):
        raise ConfigError(
            f"data is a {type(data).__name__} with the splits {list(data)}; give one as data=... "
            "and another as test=..."
        )
    elif isinstance(data, str | Path) and str(data).endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(
            f"data is {data}, a file of conversations: say data={{'name': 'instructions', 'file': "
            f"{str(data)!r}, 'client': COLUMN}} (docs/language-models.md)"
        )
    elif data is None or isinstance(data, str) or is_choice(data):
        if options := {key: value for key, value in options.items() if key not in judged}:
            raise ConfigError(
                f"{', '.join(options)}: these go with data of the program, and data is "
                f"{'not said' if data is None else data!r}"
            )
        if data is None and "model" in lent.groups and not whole:
            raise ConfigError(
                "model is an object of the program, but no data are named: give the samples of the "
                "clients as data=..."
            )
        said = data if isinstance(data, Mapping) else {} if data is None else {"name": data}
        lent.keys |= {"data": {**said, **judged}} if judged else {"data": data} if said else {}
    else:
        lent.words += OF_FRAME if is_frame(data) else OF_DATA
        lent.data = partial(lend_data, data, partitioner=partitioner, own=own)
        lent.options = options
    return lent


def lent_judges(loss: object, metrics: object) -> dict[str, Any]:
    """Lend losses and metrics that are objects; give the names of all that were said."""
    found = {} if loss is None else {"loss": lend(loss) if callable(loss) else loss}
    if metrics is None:
        return found
    listed = [metrics] if callable(metrics) or isinstance(metrics, str | Mapping) else metrics
    if not isinstance(listed, list | tuple):
        return found | {"metrics": listed}
    return found | {"metrics": [lent_metric(each) if callable(each) else each for each in listed]}


def lent_metric(metric: Any) -> str:
    """Lend a metric under the name that the ledger is to have."""
    if not isinstance(metric, Metric):
        return lend(metric)
    name = metric.name or short_name(lend(metric.function))
    return lend(metric, f"{name}@{fingerprint(metric)}")


def is_choice(data: object) -> bool:
    """Distinguish a mapping of config keys from one of clients' samples."""
    kinds = (str, int, float, list, Mapping, Path, type(None))
    return isinstance(data, Mapping) and all(isinstance(value, kinds) for value in data.values())


def _lend_method(lent: Lent, method: object) -> None:
    """Write a method of the table by its fields; lend one that is not in it."""
    if method is None or isinstance(method, str | Mapping):
        lent.keys |= {} if method is None else {"method": method}
        return
    names = [name for name, kind in METHODS.items() if type(method) is kind]
    if not dataclasses.is_dataclass(method) or isinstance(method, type):
        raise ConfigError(
            f"method is {method!r:.100}; the name of a method, a mapping of its keys, or an "
            "instance of its class is wanted"
        )
    if names:
        fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
        lent.keys["method"] = {"name": names[0]} | {
            key: plain_value(f"method.{key}", value) for key, value in fields.items()
        }
        return
    check_own(method)
    digest = hashlib.sha256(repr(method).encode()).hexdigest()[:32]
    lent.groups["method"] = {"digest": lend(method, digest)}


def check_own(method: Any) -> None:
    """Check a method that is a class of the program's own.

    Raises:
        ConfigError: If it is no method, or keeps what its fields do not show: by these a run that
            goes on knows that it has the same method.
    """
    kind = type(method).__name__
    if Method not in type(method).__mro__:
        raise ConfigError(
            f"method is a {kind}, which is derived from no method: take "
            "fedraclora.strategies.shared.layerwise.LayerMethod (CONTRIBUTING.md, A new method)"
        )
    if not isinstance(method.traits, Traits):
        raise ConfigError(
            f"method is a {kind}, which does not say what it promises: give the class "
            "`traits = Traits(...)` (CONTRIBUTING.md, A new method)"
        )
    shown = {f.name for f in dataclasses.fields(method) if f.repr}
    for name in getattr(method, "__dict__", {}):
        cached = isinstance(getattr_static(type(method), name, None), cached_property)
        if name not in shown and not cached and not name.startswith("_"):
            raise ConfigError(
                f"method is a {kind} with the attribute {name!r}, which its repr does not show, so "
                f"that a run could not tell two values of it apart: make {kind} a "
                f"@dataclass(frozen=True) with a field {name}"
            )


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
            f"local is {local.get('name')}, but train=... is your own training (local=own): leave "
            "one of them out"
        )
    if not isinstance(train, str) and not callable(train):
        raise ConfigError(f"train is {train!r:.100}; a function of a round is wanted")
    if not isinstance(train, str):
        train = lend(train)
    return {**plain, "local": {**local, "train": train}}
