"""Start a run from a PEFT adapter, merged into the model's weights before the first round."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import types
import typing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedraclora.errors import ConfigError, DataError, FedRacLoraError, ModelError
from fedraclora.imports import import_extra

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# buffers of models that are rebuilt or come from elsewhere
FOREIGN = ("layer_replication", "megatron_config")
OF_THIS_MODEL = "Give the adapter of this model, or leave init_from out"


def is_adapter(folder: Path) -> bool:
    """Check whether a folder holds an adapter of PEFT."""
    return (folder / CONFIG).is_file()


def adapter_digest(folder: Path) -> str:
    """Compute the SHA-256 of an adapter's configuration and weights.

    Raises:
        DataError: If its weights are not there.
    """
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(
                f"init_from={folder}: there is no {name} (PEFT's save_pretrained writes it)"
            )
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def merge_adapter(model: nn.Module, folder: Path) -> None:
    """Merge an adapter into a model: ``W + s B A``, and the modules that it saves in full.

    PEFT ignores many errors in a configuration; here they are refused before PEFT reads it.

    Args:
        model: Its parameters are changed in place; their names and shapes stay.
        folder: As PEFT writes it.

    Raises:
        ConfigError: If PEFT is not installed, or merges no adapter of this kind.
        DataError: If the adapter is damaged.
        ModelError: If it belongs to another model, naming the mismatch.
    """
    peft = import_extra("peft", f"init_from={folder}, an adapter of PEFT,")
    weights = _read(folder)
    config = _configured(
        peft, folder, max((max((*t.shape, 1)) for t in weights.values()), default=1)
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of layouts, which PEFT mends
        with _told(
            folder, f"the adapter fits no layer of this {type(model).__name__}", OF_THIS_MODEL
        ):
            adapted: Any = peft.get_peft_model(copy.deepcopy(model), config)
            adapters = peft.get_peft_model_state_dict
            wanted = {*adapters(adapted, save_embedding_layers=False)}
            beside = {*adapters(adapted, save_embedding_layers=True)}
        _refuse(folder, "lacks", wanted - weights.keys())
        _refuse(folder, "has, and the model has not,", weights.keys() - beside)
        _refuse(folder, "has a rank or an alpha for", _idle_patterns(adapted, config))
        with _told(
            folder, "the adapter does not fit", OF_THIS_MODEL
        ):  # of shapes, with names of layers
            found = peft.set_peft_model_state_dict(adapted, weights)
        _refuse(folder, "has, and the model has not,", set(found.unexpected_keys))
        if not hasattr(adapted, "merge_and_unload"):
            raise ConfigError(
                f"init_from={folder}: a {config.peft_type} adapter cannot be merged into weights; "
                "one "
                "of LoRA can"
            )
        with _told(folder, "PEFT cannot merge it"):
            merged = dict(adapted.merge_and_unload().named_parameters(remove_duplicate=False))
    every = dict(model.named_parameters(remove_duplicate=False))
    _refuse(folder, "changes the names of", every.keys() ^ merged.keys())
    _refuse(
        folder,
        "makes other shapes, or numbers that are not finite, of",
        {n for n, p in every.items() if p.shape != merged[n].shape or not _is_finite(merged[n])},
    )
    with torch.no_grad():
        for name, parameter in every.items():
            parameter.copy_(merged[name])
    apart = [name for name, parameter in every.items() if not torch.equal(parameter, merged[name])]
    _refuse(folder, "unties", set(apart))


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights of an adapter, which must be finite floating-point numbers."""
    path = folder / WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"init_from={folder}: {path} is damaged: {error}") from error
    for name, value in weights.items():
        if not value.is_floating_point():
            raise DataError(
                f"init_from={folder}: {name} in {path} holds {value.dtype}; numbers with a "
                "fraction "
                "are wanted"
            )
        if not _is_finite(value):
            raise DataError(f"init_from={folder}: {name} in {path} has values that are not finite")
    return weights


def _is_finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value.float()).all())  # not implemented for 8 bits


def _configured(peft: Any, folder: Path, largest: int) -> Any:
    """Read an adapter's configuration: keys that PEFT knows, with values of the right type.

    Args:
        peft: The package.
        folder: Of the adapter.
        largest: Largest dimension of a stored tensor; a larger rank would only waste memory.

    Raises:
        DataError: Naming the key.
    """
    path = folder / CONFIG
    damaged = f"{CONFIG} is damaged"
    with _told(folder, damaged, kind=DataError):
        config = json.loads(path.read_text(encoding="utf-8"))
        kind: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    hints = typing.get_type_hints(kind)
    for key, value in config.items():
        if key == "runtime_config":
            continue  # PEFT leaves it out
        if key not in hints:
            raise DataError(
                f"init_from={folder}: {CONFIG} has {key}, which this PEFT ({peft.__version__}) "
                "does "
                "not know: install a newer one, or leave it out if it is a slip"
            )
        ranks = [value] if key == "r" else []
        fits = _fits(value, float if key == "lora_alpha" else hints[key])
        if key in {"rank_pattern", "alpha_pattern"} and isinstance(value, dict):
            fits = all(_fits(one, float) for one in value.values())
            ranks = [*value.values()] if key == "rank_pattern" else []
        if any(type(rank) is not int or not 1 <= rank <= largest for rank in ranks):
            fits = False
        if not fits or (key in FOREIGN and value):
            raise DataError(f"init_from={folder}: {CONFIG} says {key}={value!r}, which cannot be")
    with _told(folder, damaged, kind=DataError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftConfig.from_pretrained(folder)


def _fits(value: object, hint: object) -> bool:
    """Check a JSON value against a type hint of PEFT's; classes stand for mappings."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in {typing.Union, types.UnionType}:
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(p) and value == p for p in parts) or (
            isinstance(value, str) and re.fullmatch(r"pissa_niter_\d{1,3}", value) is not None
        )
    if hint is float:
        return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
    if origin in {list, tuple}:
        return isinstance(value, list) and all(_fits(one, parts[0]) for one in value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [one.value for one in hint]
    return type(value) is hint if hint in {int, str, bool, type(None)} else isinstance(value, dict)


def _idle_patterns(adapted: Any, config: Any) -> set[str]:
    """List patterns of per-layer ranks and scales that match no adapted layer."""
    names = adapted.base_model.targeted_module_names
    patterns = {*(config.rank_pattern or ()), *(config.alpha_pattern or ())}
    return {p for p in patterns if not any(re.match(rf"(.*\.)?({p})$", name) for name in names)}


@contextmanager
def _told(
    folder: Path, what: str, do: str = "", kind: type[FedRacLoraError] = ModelError
) -> Iterator[None]:
    """Turn errors of PEFT, which depend on the kind of adapter, into one-line errors of ours."""
    try:
        yield
    except Exception as error:
        text = " ".join(f"init_from={folder}: {what}: {type(error).__name__}: {error}".split())
        raise kind(f"{text}. {do}" if do else text) from error


def _refuse(folder: Path, what: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise ModelError(f"init_from={folder}: the adapter {what} {shown}. {OF_THIS_MODEL}")
