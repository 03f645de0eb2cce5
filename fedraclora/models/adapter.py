"""PEFT adapters as a beginning: merged into the weights of a model before its first round."""

from __future__ import annotations

import copy
import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedraclora.errors import ConfigError, DataError, ModelError
from fedraclora.imports import import_extra

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GIVEN = "Give the adapter of this model, or leave start out"


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter of PEFT."""
    return (folder / CONFIG).is_file()


def adapter_digest(folder: Path) -> str:
    """Compute the SHA-256 of an adapter: of its configuration and its weights.

    Raises:
        DataError: If its weights are not there.
    """
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(
                f"start={folder}: there is no {name} (PEFT's save_pretrained writes it)"
            )
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def merge_adapter(model: nn.Module, folder: Path) -> None:
    """Merge an adapter into the weights of a model: ``W + s B A``, and what it holds in full.

    Args:
        model: Its parameters are changed in place; their names and shapes stay.
        folder: As PEFT writes it.

    Raises:
        ConfigError: If PEFT is not installed, or merges no adapter of this kind.
        DataError: If the adapter is damaged.
        ModelError: If it is of another model, naming what does not fit.
    """
    peft = import_extra("peft", f"start={folder}, an adapter of PEFT,")
    weights = _read(folder)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of layouts, which PEFT mends
        try:
            config = peft.PeftConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"start={folder}: {CONFIG} is damaged: {error}") from error
        try:
            adapted: Any = peft.get_peft_model(copy.deepcopy(model), config)
        except (ValueError, AttributeError) as error:
            raise ModelError(
                f"start={folder}: the adapter fits no layer of this {type(model).__name__}: "
                f"{error}. {GIVEN}"
            ) from error
        wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        _refuse(folder, "lacks", wanted - weights.keys())
        try:
            found = peft.set_peft_model_state_dict(adapted, weights)
        except (RuntimeError, KeyError) as error:  # of shapes, with the names of the layers
            raise ModelError(
                f"start={folder}: the adapter does not fit: {error}. {GIVEN}"
            ) from error
        _refuse(folder, "has, and the model has not,", set(found.unexpected_keys))
        if not hasattr(adapted, "merge_and_unload"):
            raise ConfigError(
                f"start={folder}: a {config.peft_type} adapter cannot be merged into weights; one "
                "of LoRA can"
            )
        merged = dict(adapted.merge_and_unload().named_parameters(remove_duplicate=False))
    every = dict(model.named_parameters(remove_duplicate=False))
    _refuse(folder, "changes the names of", every.keys() ^ merged.keys())
    with torch.no_grad():
        for name, parameter in every.items():
            parameter.copy_(merged[name])
    apart = [name for name, parameter in every.items() if not torch.equal(parameter, merged[name])]
    _refuse(folder, "unties", set(apart))


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights of an adapter, which must be finite."""
    path = folder / WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"start={folder}: {path} is damaged: {error}") from error
    for name, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            raise DataError(f"start={folder}: {name} in {path} has values that are not finite")
    return weights


def _refuse(folder: Path, what: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise ModelError(f"start={folder}: the adapter {what} {shown}. {GIVEN}")
