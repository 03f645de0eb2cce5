"""Transformers of Hugging Face: pretrained, or a small BERT with random weights.

The models are unmodified. Two things are set in their configuration: float32 weights, and no
dropout of attention probabilities. Attention applies that dropout as a function, not as a
module, where no mask can be keyed by client and step; hidden states are dropped by modules.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any

from torch import nn

from fedraclora.errors import ConfigError, ModelError
from fedraclora.limits import Composed, Count, Fraction, limited
from fedraclora.models.built import (
    Attention,
    Base,
    Built,
    found_head,
    found_targets,
    held_in,
    require_heads,
    require_input,
    seeded,
)
from fedraclora.models.dropout import refuse_idle_rate
from fedraclora.models.pretrained import load_pretrained

# How architectures call rates of dropout in their configurations: hidden_dropout_prob, resid_pdrop,
# dropout_rate, ...
_DROPOUT = re.compile(r"(dropout|pdrop)(_prob|_rate)?")


@limited("model")
def build_hf(
    *,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    path: Annotated[str, Composed()],
    layers: Count | None = None,
    dropout: Fraction = 0.0,
    attention: Attention = "sdpa",
    base: Base = "float32",
    sha256: str | None = None,
) -> Built:
    """Load a pretrained model for sequence classification (or regression, with one output).

    Args:
        shape: Must be empty: the data are token ids.
        classes: Number of outputs; a new head is drawn where the stored one has another number.
        seed: The seed of the run; the new head is drawn from it.
        path: A folder, a GGUF file (it is de-quantised to float32), ``package:NAME/path`` or
            ``hub:NAME``; only the last may download.
        layers: Keep the first so many layers; None for all.
        dropout: Dropout of hidden states.
        attention: ``sdpa`` (one fused kernel) or ``eager`` (plain products).
        base: Precision of the weights: ``float32``; or, for methods that never merge,
            ``bfloat16``, ``int8`` or ``int4`` (`fedraclora.models.built.held_in`).
        sha256: SHA-256 of ``model.safetensors`` in the folder, or None.

    Returns:
        The model. The head is what lies beside the encoder; where it is new, it is named as drawn.
        The targets are query and value, or all linear layers where none has that name.

    Raises:
        ConfigError: If a key is wrong, naming it, or the model takes no dropout.
        DataError: If the model is missing, damaged or not whole, or its weights are another file.
    """
    from transformers import AutoModelForSequenceClassification as Kind

    require_input("hf", shape, classes, text=True)

    def prepare(config: Any) -> None:
        config.problem_type = None  # of what it learnt before
        set_dropout(config, dropout)
        cut_layers(config, layers)
        if config.pad_token_id is None:
            ends = config.eos_token_id  # Llama 3 has several
            config.pad_token_id = next(iter(ends), None) if isinstance(ends, list) else ends

    given: dict[str, Any] = {"attention": attention, "new_head": True, "num_labels": classes}
    with seeded(seed, "model"):
        model, drawn = load_pretrained(Kind, path, sha256, prepare, **given)
    refuse_idle_rate(model, dropout)
    return held_in(replace(_built(model), drawn=drawn), base)


@limited("model")
def build_transformer(
    *,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    hidden: Count = 64,
    layers: Count = 2,
    heads: Count = 4,
    intermediate: Count = 256,
    vocab: Count = 30522,
    max_length: Count = 128,
    dropout: Fraction = 0.0,
    attention: Attention = "sdpa",
) -> Built:
    """Build a BERT for sequence classification with random weights; nothing is downloaded.

    Args:
        shape: Must be empty: the data are token ids.
        classes: Number of outputs.
        seed: The seed of the run.
        hidden: Width, a multiple of ``heads``.
        layers: Number of layers.
        heads: Attention heads.
        intermediate: Width of the feed-forward layers.
        vocab: Number of token ids; at least the vocabulary of the tokenizer.
        max_length: Longest input; at least ``data.max_length``.
        dropout: Dropout of hidden states.
        attention: ``sdpa`` (one fused kernel) or ``eager`` (plain products).

    Returns:
        The model; head ``classifier``, targets query and value.

    Raises:
        ConfigError: If a key is wrong, naming it.

    References:
        Devlin et al., *BERT*, NAACL 2019, arXiv:1810.04805.
    """
    from transformers import BertConfig, BertForSequenceClassification

    require_input("transformer", shape, classes, text=True)
    require_heads(hidden, heads)
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=max_length,
        num_labels=classes,
        attn_implementation=attention,
    )
    set_dropout(config, dropout)
    with seeded(seed, "model"):
        return _built(BertForSequenceClassification(config))


def _built(model: Any) -> Built:
    """Find the head (what lies beside the encoder and has weights) and the targets."""
    head = found_head(model)
    if not head:
        raise ModelError(f"{type(model).__name__} has no head beside {model.base_model_prefix}")
    network: nn.Module = model
    return Built(network.train(), head, found_targets(network, "query,value"))


def set_dropout(config: Any, dropout: float) -> None:
    """Set the dropout of hidden states by every name that a configuration has for it."""
    for name, rate in list(vars(config).items()):
        if _DROPOUT.search(name) and not isinstance(rate, bool):
            by_function = "att" in name or "activation" in name
            setattr(config, name, 0.0 if by_function else dropout)


def cut_layers(config: Any, layers: int | None) -> None:
    """Keep the first so many layers of a configuration; None keeps all.

    Raises:
        ConfigError: If the model has fewer.
    """
    if layers is None:
        return
    if layers > config.num_hidden_layers:
        raise ConfigError(f"model.layers={layers}: the model has {config.num_hidden_layers} layers")
    config.num_hidden_layers = layers
