"""Causal language models of transformers: pretrained, or small with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fedraclora.errors import ConfigError, ModelError, unknown
from fedraclora.limits import Count, Fraction, limited
from fedraclora.models.built import (
    Attention,
    Base,
    Built,
    found_targets,
    held_in,
    require_heads,
    require_input,
    seeded,
)
from fedraclora.models.dropout import refuse_idle_rate
from fedraclora.models.hf import cut_layers, set_dropout
from fedraclora.models.pretrained import load_pretrained

QUERY_VALUE = ("q_proj,v_proj", "c_attn", "query_key_value")  # of query and value, as PEFT has them


@limited("model")
def build_causal_lm(
    *,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    path: str | None = None,
    config: Mapping[str, object] | None = None,
    layers: Count | None = None,
    dropout: Fraction = 0.0,
    attention: Attention = "sdpa",
    base: Base = "float32",
    checkpointing: bool = False,
    sha256: str | None = None,
) -> Built:
    """Load a causal language model (Llama, Qwen, GPT-2, SmolLM, ...), or build one at random.

    Args:
        shape: Must be empty: the data are token ids.
        classes: Number of different tokens of the data.
        seed: The seed of the run; random weights are drawn from it.
        path: A folder, a GGUF file, ``package:NAME/path`` or ``hub:NAME``; only the last may
            download. A GGUF file is dequantised to ``base``: the weights stay rounded.
        config: Instead of ``path``: ``model_type`` and further keys of its configuration in
            transformers, for random weights; ``vocab_size`` is that of the data if it is not said.
        layers: Keep the first so many layers; None for all.
        dropout: Dropout of hidden states.
        attention: ``sdpa`` (one fused kernel) or ``eager`` (plain products).
        base: Precision of the weights: ``float32``; or, for methods that never merge,
            ``bfloat16``, ``int8`` or ``int4`` (`fedraclora.models.built.held_in`).
        checkpointing: Keep only the inputs of each block for the backward pass, and compute the
            rest again: less memory, about a third more time.
        sha256: SHA-256 of the GGUF file, or of ``model.safetensors`` in the folder, or None.

    Returns:
        The model; head: the output layer, which is often tied to the table of tokens and then can
        only be frozen. The targets are the projections of query and value.

    Raises:
        ConfigError: If a key is wrong, naming it, or the model takes no dropout.
        DataError: If the model is missing, damaged or not whole, or its weights are another file.
        ModelError: If the model has no output layer over tokens.
    """
    require_input("causal_lm", shape, classes, text=True)
    if (path is None) == (config is None):
        raise ConfigError(
            f"model.path is {path} and model.config is {config}: set one of them. A path loads "
            "weights (a folder, a GGUF file, package:NAME/path or hub:NAME); a config, such as "
            "{model_type: llama, hidden_size: 64}, draws them"
        )
    prepare = partial(_prepare, layers=layers, dropout=dropout)
    if path is not None:
        from transformers import AutoModelForCausalLM as Kind

        model, _ = load_pretrained(Kind, path, sha256, prepare, attention=attention, new_head=False)
    else:
        model = _drawn(config or {}, classes, seed, prepare, attention)
    refuse_idle_rate(model, dropout)
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"model.checkpointing is true, but {type(model).__name__} has no blocks that can "
                "be computed again: leave it at false"
            )
        newest = getattr(model, "activation_checkpointing_enable", None)  # its name from v5.24 on
        (newest or model.gradient_checkpointing_enable)({"use_reentrant": False})
    network: nn.Module = model.train()
    return held_in(Built(network, (_head(model),), found_targets(network, *QUERY_VALUE)), base)


def _drawn(
    config: Mapping[str, object],
    classes: int,
    seed: int,
    prepare: Callable[[Any], None],
    attention: str,
) -> Any:
    """Draw the weights of a model of some configuration."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, rest = config.get("model_type"), {k: v for k, v in config.items() if k != "model_type"}
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise unknown("model.config.model_type", str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    # No token of these ends or pads a text by itself: the tokenizer says which do.
    free = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    try:
        given = CONFIG_MAPPING[kind](**{"vocab_size": classes, **free, **rest})
        prepare(given)
        with seeded(seed, "model"):
            return AutoModelForCausalLM.from_config(
                given, dtype=torch.float32, attn_implementation=attention
            )
    except ConfigError:
        raise
    except Exception as error:  # each configuration has checks, and errors, of its own
        raise ConfigError(f"model.config={dict(config)} makes no model: {error}") from error


def _prepare(config: Any, layers: int | None, dropout: float) -> None:
    set_dropout(config, dropout)
    cut_layers(config, layers)
    config.use_cache = False  # of past tokens: for generating, which asks for it itself


def _head(model: Any) -> str:
    """Name the output layer."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and head is not None:
            return str(name)
    raise ModelError(f"{type(model).__name__} has no output layer over tokens")


@limited("model")
def build_gpt(
    *,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    hidden: Count = 64,
    layers: Count = 2,
    heads: Count = 4,
    max_length: Count = 128,
    dropout: Fraction = 0.0,
    attention: Attention = "sdpa",
) -> Built:
    """Build a GPT-2 that predicts the next token.

    Its output layer has weights of its own: tied to the table of tokens, as in the original, it
    could not be trained apart from it.

    Args:
        shape: Must be empty: the data are token ids.
        classes: Number of different tokens.
        seed: The seed of the run.
        hidden: Width, a multiple of ``heads``.
        layers: Number of layers.
        heads: Attention heads.
        max_length: Longest input.
        dropout: Dropout of embeddings and of what each block adds.
        attention: ``sdpa`` (one fused kernel) or ``eager`` (plain products).

    Returns:
        The model; head ``lm_head``, targets all linear layers.

    Raises:
        ConfigError: If a key is wrong, naming it.

    References:
        Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    require_input("gpt", shape, classes, text=True)
    require_heads(hidden, heads)
    config = GPT2Config(
        vocab_size=classes,
        n_positions=max_length,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,  # applied as a function, where no mask can be keyed by client and step
        bos_token_id=None,
        eos_token_id=None,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, as one kernel in place of eight
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=attention,
    )
    with seeded(seed, "model"):
        return Built(GPT2LMHeadModel(config).train(), ("lm_head",), "all-linear")
