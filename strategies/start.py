"""Start a run from a finished run or a PEFT adapter, instead of its model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from fedraclora.binding import Plain, PlainDict
from fedraclora.config.run_config import RunConfig, from_plain
from fedraclora.data.locate import user_path
from fedraclora.errors import CheckpointError, ConfigError, ModelError
from fedraclora.models.adapter import adapter_digest, is_adapter, merge_adapter
from fedraclora.run.folder import is_finished, read_summary, resume_word
from fedraclora.run.trusted import read_trusted
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.weights import load_weights


def resolved_start(plain: Mapping[str, object]) -> PlainDict:
    """Write the checksum of a run's start beside its path, for a config that is stored.

    Args:
        plain: The config of a new run.

    Raises:
        FedRacLoraError: If the start does not exist.
    """
    start = plain.get("init_from")
    if not isinstance(start, str):
        return dict(plain)
    folder = user_path("init_from", start).resolve()
    return {**plain, "init_from": {"path": str(folder), "sha256": start_digest(folder)}}


def start_digest(folder: Path) -> str:
    """Return the checksum of a run's weights, from its summary, or of an adapter's files.

    Raises:
        CheckpointError: If the run has not finished.
        ConfigError: If the folder has neither.
    """
    if is_adapter(folder):
        return adapter_digest(folder)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"init_from={folder}: the folder holds neither a run (config.yaml) nor a PEFT "
            "adapter (adapter_config.json). To start from a Hugging Face folder, set "
            "model=hf and model.path"
        )
    if not is_finished(folder):
        raise CheckpointError(
            f"init_from={folder}: that run is not finished. Resume it with {resume_word(folder)}"
        )
    return str(read_summary(folder)["weights_digest"])


def begin_from(config: RunConfig, model: nn.Module) -> dict[str, str]:
    """Set a model to the start of its run; unchanged if ``init_from`` is not set.

    Args:
        config: The config of the run, with a resolved start.
        model: The model, which is changed in place.

    Returns:
        Facts for the summary.

    Raises:
        FedRacLoraError: If it has changed since the run began, or does not fit the model.
    """
    if config.init_from is None:
        return {}
    start = {"path": config.init_from} if isinstance(config.init_from, str) else config.init_from
    if not {"path"} <= start.keys() <= {"path", "sha256"}:
        raise ConfigError(
            f"init_from={start}: not a folder. Name the folder of a finished run or of an adapter"
        )
    folder = Path(start["path"]).expanduser()
    found = start_digest(folder)
    if found != start.get("sha256", found):
        raise CheckpointError(
            f"init_from={folder} has changed since the config was written: its checksum is "
            f"{found}, expected {start['sha256']}. Restore it from a copy"
        )
    if is_adapter(folder):
        merge_adapter(model, folder)
        return {"adapter": str(folder), "sha256": found}
    _take_weights(folder, model, config.plain)
    return {"run": str(folder), "sha256": found}


def _take_weights(folder: Path, model: nn.Module, own: Plain) -> None:
    """Copy the weights of a finished run, whose code must be trusted or the user's own."""
    before = from_plain(read_trusted(folder, own), METHODS, resuming=True)
    if before.method.client_state:
        raise ConfigError(
            f"init_from={folder}: the clients of {type(before.method).__name__} kept a factor "
            "of every adapter private, so the server has no complete model to start from. "
            "Name the folder of a run of another method"
        )
    weights, parameters = load_weights(folder, own=own), dict(model.named_parameters())
    if odd := sorted(weights.keys() ^ parameters.keys()):
        raise ModelError(
            f"init_from={folder}: that run trained another model, which differs in {odd[0]}. "
            "Set model to the same model"
        )
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise ModelError(
                f"init_from={folder}: {name} is {tuple(weights[name].shape)} there and "
                f"{tuple(parameter.shape)} here. Set the same model and classes as in that run"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
