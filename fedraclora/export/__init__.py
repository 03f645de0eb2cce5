"""Exports: a trained model in the forms that other libraries read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from fedraclora.errors import ConfigError, unknown
from fedraclora.export.card import write_card
from fedraclora.export.gguf_file import write_gguf
from fedraclora.export.hf_folder import write_hf
from fedraclora.export.peft_adapter import write_peft
from fedraclora.export.state_dict import write_state_dict
from fedraclora.export.trained import TrainedModel

__all__ = ["FORMATS", "TrainedModel", "export"]

FORMATS: dict[str, Callable[[TrainedModel, Path, int | None], dict[str, object]]] = {
    "peft": write_peft,
    "hf": write_hf,
    "state_dict": write_state_dict,
    "gguf": write_gguf,
}


def export(
    trained: TrainedModel, folder: Path, form: str, rank: int | None = None
) -> dict[str, object]:
    """Write a trained model into a new folder, with a model card; nothing is left if it fails.

    Args:
        trained: The model.
        folder: Made where it is missing.
        form: A key of `FORMATS`.
        rank: With ``peft``, the largest rank of a layer.

    Returns:
        What the format says of what it wrote; with ``peft``, ``layers``.

    Raises:
        ConfigError: If the format is unknown or does not fit, or the folder holds something.
        ModelError: If the format has no place for a layer.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if rank is not None and (isinstance(rank, bool) or rank < 1):
        raise ConfigError(f"rank is {rank}; a whole number of at least 1 is wanted")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something already; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        record = FORMATS[form](trained, folder, rank)
        write_card(trained, folder, form, record)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return record
