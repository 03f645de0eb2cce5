"""Texts to token ids, with a tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedraclora.data.locate import from_pretrained, model_source
from fedraclora.errors import ConfigError, DataError

Encoder = Callable[[list[list[str]]], dict[str, torch.Tensor]]


def make_encoder(tokenizer: str, *, root: str | None, max_length: int) -> Encoder:
    """Load a tokenizer; give the function that encodes texts, or pairs of texts.

    Args:
        tokenizer: A folder, ``package:NAME/path`` or ``hub:NAME``; only the last may download.
        root: The data root, or None.
        max_length: Tokens per sample: shorter ones are padded, longer ones are cut.

    Returns:
        A function from one or two columns of N texts to the inputs of a model, each int64
        [N, max_length].

    Raises:
        DataError: If there is no such tokenizer, or it cannot pad.
    """
    from transformers import AutoTokenizer

    source, local = model_source(tokenizer, key="data.tokenizer", root=root)
    loaded = from_pretrained(AutoTokenizer, source, local, "data.tokenizer")
    if loaded.pad_token is None:
        if loaded.eos_token is None:
            raise DataError(f"data.tokenizer={tokenizer} has no padding token: choose another")
        loaded.pad_token = loaded.eos_token

    def encode(texts: list[list[str]]) -> dict[str, torch.Tensor]:
        batch = loaded(
            *texts,
            padding="max_length",
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        return {name: batch[name].to(torch.int64) for name in batch}

    return encode


def require_tokenizer(tokenizer: str | None) -> str:
    """Give the name of a tokenizer.

    Raises:
        ConfigError: If there is none.
    """
    if tokenizer is None:
        raise ConfigError(
            "data.tokenizer is not set: name the folder of a tokenizer; it is that of model.path "
            "where that is set"
        )
    return tokenizer
