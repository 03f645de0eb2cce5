"""What a model builder gives, and how initial weights are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from fedraclora.errors import ConfigError
from fedraclora.rng import hash_key

ATTENTION = ("sdpa", "eager")  # one fused kernel, or plain products


@dataclass(frozen=True)
class Built:
    """A network and what the rest must know of it.

    Attributes:
        model: The network, float32, with its initial weights; in training mode.
        head: Name prefixes of the final layer; empty where there is nothing but one layer.
        targets: The default pattern of adapted layers (`fedraclora.lowrank.layers.find_targets`).
        narrow: Whether the weights are narrower than float32, and are to stay so.
    """

    model: nn.Module
    head: tuple[str, ...]
    targets: str
    narrow: bool = False


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Draw what torch modules draw at construction from a leaf of the seed tree.

    Modules take their initial weights from torch's global generator; it is put back at the end.

    Args:
        seed: The seed of the run.
        purpose: What is drawn, for example ``"model"``.

    Example:
        >>> def weights():
        ...     with seeded(1, "model"):
        ...         return torch.rand(3)
        >>> bool((weights() == weights()).all())
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash_key(seed, purpose) >> 65)
        yield


def require_dense(name: str, shape: tuple[int, ...], classes: int) -> int:
    """Check that a model of dense inputs fits the data; give the numbers of one input.

    Raises:
        ConfigError: If the data are token ids, or there is nothing to predict.
    """
    if not shape:
        raise ConfigError(
            f"model={name} reads numbers, but this data set has token ids: "
            "use model=transformer or model=hf"
        )
    require_counts("the number of outputs", [classes])
    return prod(shape)


def require_text(name: str, shape: tuple[int, ...], classes: int) -> None:
    """Check that a model of token ids fits the data.

    Raises:
        ConfigError: If the data are dense, or there is nothing to predict.
    """
    if shape:
        raise ConfigError(
            f"model={name} reads token ids, but this data set has inputs of shape "
            f"{tuple(shape)}: use model=mlp, model=cnn or model=linear"
        )
    require_counts("the number of outputs", [classes])


def check_fit(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Check that a model of token ids knows all tokens of the data and is long enough.

    Without the check, the error would be that of an index in an embedding.

    Args:
        model: A network; one without ``config`` passes.
        inputs: Inputs of a data set; those without ``input_ids`` [N, length] pass.

    Raises:
        ConfigError: If a token id or the length is beyond the model's embeddings.
    """
    config, ids = getattr(model, "config", None), inputs.get("input_ids")
    if config is None or ids is None:
        return
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise ConfigError(
            f"the data have token id {int(ids.max())}, but the model knows {vocabulary} tokens: "
            "set model.vocab to the size of the tokenizer's vocabulary, or use the model's own "
            "tokenizer"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and ids.shape[1] > longest:
        raise ConfigError(
            f"data.max_length={ids.shape[1]}, but the model reads {longest} tokens at most: "
            "lower data.max_length or raise model.max_length"
        )


def require_counts(key: str, values: list[int]) -> None:
    """Check that all of a list are whole numbers of at least 1.

    Raises:
        ConfigError: If not, naming the key.
    """
    if any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
        raise ConfigError(f"{key}={values}: want whole numbers, at least 1")


def require_sizes(sizes: Mapping[str, int]) -> None:
    """Check the sizes of a transformer: ``hidden``, ``heads`` and whatever else it counts.

    Raises:
        ConfigError: If one is no whole number of at least 1, or heads do not divide the width.
    """
    for key, value in sizes.items():
        require_counts(f"model.{key}", [value])
    if sizes["hidden"] % sizes["heads"]:
        raise ConfigError(
            f"model.hidden={sizes['hidden']} is not a multiple of model.heads={sizes['heads']}"
        )


def require_attention(attention: str) -> None:
    """Check the name of an implementation of attention.

    Raises:
        ConfigError: If it is unknown.
    """
    if attention not in ATTENTION:
        raise ConfigError(f"model.attention={attention}: want one of {', '.join(ATTENTION)}")


def require_dropout(dropout: float) -> None:
    """Check a dropout probability.

    Raises:
        ConfigError: If it is not in [0, 1).
    """
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout={dropout}: want a probability, at least 0 and below 1")
