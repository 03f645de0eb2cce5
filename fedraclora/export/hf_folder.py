"""A Hugging Face folder of a trained model: what ``from_pretrained`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedraclora.data.locate import from_pretrained
from fedraclora.errors import ConfigError, DataError, ModelError
from fedraclora.export.trained import ExportRecord, Order, TrainedModel, is_hugging_face
from fedraclora.models.pretrained import quiet
from fedraclora.weights.files import save_tensors


def write_hf(trained: TrainedModel, order: Order) -> ExportRecord:
    """Write the merged model with ``save_pretrained``, and its tokenizer where it has one.

    Args:
        trained: What the run trained.
        order: Where to; without a rank: the weights are whole.

    Raises:
        ConfigError: If the model is none of transformers', or a rank is given.
        ModelError: If transformers does not read back what was written.
    """
    no_rank(order.rank, "hf")
    model: Any = trained.model
    if not is_hugging_face(model):
        raise ConfigError(
            f"a {type(model).__name__} is no model of transformers, and has no Hugging Face "
            "folder: take --format state_dict, or peft"
        )
    save_model(model, order.folder, trained)
    if not order.check:
        return {}
    again: Any = type(model).from_pretrained(order.folder, dtype=None, local_files_only=True)
    found = again.state_dict()
    for name, value in model.state_dict().items():
        if name not in found or not torch.equal(found[name], value):
            raise ModelError(
                f"transformers does not give {name} back as it was trained (it ties it to another "
                "weight): take --format state_dict"
            )
    return {}


def no_rank(rank: int | None, form: str) -> None:
    """Refuse a rank where weights are whole.

    Raises:
        ConfigError: Naming the format.
    """
    if rank is not None:
        raise ConfigError(f"--rank {rank} is of --format peft; with {form} the weights are whole")


def save_model(model: nn.Module, folder: Path, trained: TrainedModel) -> None:
    """Write a model of transformers, and a copy of the tokenizer of data or model, if there is one.

    Raises:
        DataError: If the tokenizer of the data cannot be read.
    """
    from transformers import AutoTokenizer

    known: Any = model
    with quiet():
        known.save_pretrained(folder)
    if trained.tokenizer is None:
        return
    try:
        local = Path(trained.tokenizer).exists()
        tokenizer = from_pretrained(AutoTokenizer, trained.tokenizer, local, "the tokenizer")
        if tokenizer.pad_token is None:  # as in training
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
    except DataError:
        if trained.tokenizer != trained.source:  # a model's folder may be without one
            raise


def write_state_dict(trained: TrainedModel, order: Order) -> ExportRecord:
    """Write ``model.safetensors``: parameters and buffers, tied ones under each of their names.

    Args:
        trained: What the run trained.
        order: Where to; without a rank: the weights are whole.

    Raises:
        ConfigError: If a rank is given.
    """
    no_rank(order.rank, "state_dict")
    tensors = trained.model.state_dict()
    digest = {"weights_digest": trained.facts.get("weights_digest")}
    save_tensors(order.folder / "model.safetensors", tensors, digest, sync=False)
    return {}
