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
from fedraclora.export.trained import Order, TrainedModel

__all__ = ["FORMATS", "TrainedModel", "export"]

FORMATS: dict[str, Callable[[TrainedModel, Order], dict[str, object]]] = {
    "peft": write_peft,
    "hf": write_hf,
    "state_dict": write_state_dict,
    "gguf": write_gguf,
}


def export(
    trained: TrainedModel, folder: Path, form: str, rank: int | None = None, *, check: bool = True
) -> dict[str, object]:
    """Write a trained model into a new folder, with a model card; nothing is left if it fails.

    The folder is written beside its place and renamed: it is whole, or not there. The same export
    has the same bytes.

    Args:
        trained: The model.
        folder: Made where it is missing.
        form: A key of `FORMATS`.
        rank: With ``peft``, the largest rank of a layer.
        check: Read back what was written, which takes as long again.

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
    folder = folder.resolve()
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{str(folder)!r} is no UTF-8, as paths of safetensors are") from error
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something already; name a new folder")
    partial = folder.with_name(f".{folder.name}.partial")  # one that a kill left is written anew
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        record = FORMATS[form](trained, Order(partial, folder, rank, check)) | {"read_back": check}
        write_card(trained, partial, form, record)
        mode = partial.stat().st_mode & 0o777  # safetensors writes files that nobody else may read
        for path in partial.rglob("*"):
            path.chmod(mode if path.is_dir() else mode & 0o666)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return record
