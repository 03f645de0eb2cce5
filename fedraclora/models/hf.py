"""Build Hugging Face transformers: classifiers and causal language models, pretrained or random.

The models are unmodified. Two settings of their configuration change: float32 weights, and no
dropout of attention probabilities. Attention applies that dropout as a function, so that no mask
can be keyed by client and step; dropout of hidden states uses modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import nn

from fedraclora.errors import ConfigError, ModelError, unknown
from fedraclora.limits import Count, Fraction, HydraDefault, limited
from fedraclora.models.built import (
    BFLOAT16,
    NARROW,
    QUANTIZED,
    READS_TOKENS,
    Attention,
    Base,
    BuiltModel,
    found_head,
    found_targets,
    held_in,
    refuse_idle_rate,
    require_heads,
    require_input,
    seeded,
)
from fedraclora.models.pretrained import load_pretrained
from fedraclora.narrow_weight import BITS

# Names of dropout rates in the configurations of architectures: hidden_dropout_prob, resid_pdrop,
# dropout_rate, ...
_DROPOUT = re.compile(r"(dropout|pdrop)(_prob|_rate)?")


def few_bits(base: object) -> str:
    """Say in which precision below float32 a base model is, if it is."""
    return "" if base == "float32" else f"model.base={base}"


@READS_TOKENS
@NARROW.where(lambda it: few_bits(it["base"]))
@QUANTIZED.where(lambda it: it["base"] in BITS and few_bits(it["base"]))
@BFLOAT16.where(lambda it: it["base"] == "bfloat16")
@limited("model")
def build_hf(
    *,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    path: Annotated[str, HydraDefault()],
    layers: Count | None = None,
    dropout: Fraction = 0.0,
    attention: Attention = "sdpa",
    base: Base = "float32",
    sha256: str | None = None,
) -> BuiltModel:
    """Load a pretrained model for sequence classification (or regression, with one output).

    Args:
        shape: Must be empty: the data are token ids.
        classes: Number of outputs; a new head is drawn where the stored one has another number.
        seed: The seed of the run; the new head is drawn from it.
        path: A folder, a GGUF file (it is de-quantized to float32), ``package:NAME/path`` or
            ``hub:NAME``; only the last may download.
        layers: Keep the first so many layers; None for all.
        dropout: Dropout of hidden states.
        attention: ``sdpa`` (one fused kernel) or ``eager`` (plain products).
        base: Precision of the weights: ``float32``; or, for methods that never merge,
            ``bfloat16``, ``int8`` or ``int4`` (`fedraclora.models.built.held_in`).
        sha256: SHA-256 of ``model.safetensors`` in the folder, or None.

    Returns:
        The model. The head is the part outside the encoder; a new one is listed in ``drawn``. The
        targets are query and value, or all linear layers if none has that name.

    Raises:
        ConfigError: If a key is wrong, naming it, or the model takes no dropout.
        DataError: If the model is missing, damaged or not whole, or its weights are another file.
    """
    from transformers import AutoModelForSequenceClassification as Kind

    require_input("hf", shape, classes, text=True)

    def prepare(config: Any) -> None:
        config.problem_type = None  # settings of its earlier training
        set_dropout(config, dropout)
        cut_layers(config, layers)
        if getattr(config, "pad_token_id", None) is None:  # image models have none
            ends = getattr(config, "eos_token_id", None)  # Llama 3 has several
            config.pad_token_id = next(iter(ends), None) if isinstance(ends, list) else ends

    given: dict[str, Any] = {"attention": attention, "new_head": True, "num_labels": classes}
    with seeded(seed, "model"):
        model, drawn = load_pretrained(Kind, path, sha256, prepare, **given)
    refuse_idle_rate(model, dropout)
    return held_in(replace(_built(model), drawn=drawn), base)


@READS_TOKENS
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
) -> BuiltModel:
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


def _built(model: Any) -> BuiltModel:
    """Find the head (the modules outside the encoder that have weights) and the targets."""
    head = found_head(model)
    if not head:
        raise ModelError(f"{type(model).__name__} has no head beside {model.base_model_prefix}")
    network: nn.Module = model
    return BuiltModel(network.train(), head, found_targets(network, "query,value"))


def set_dropout(config: Any, dropout: float) -> None:
    """Set the dropout of hidden states under every name in a configuration."""
    for name, rate in list(vars(config).items()):
        if _DROPOUT.search(name) and not isinstance(rate, bool):
            by_function = "att" in name or "activation" in name
            setattr(config, name, 0.0 if by_function else dropout)


def cut_layers(config: Any, layers: int | None) -> None:
    """Keep only the first layers of a configuration; None keeps all.

    Raises:
        ConfigError: If the model has fewer.
    """
    if layers is None:
        return
    if layers > config.num_hidden_layers:
        raise ConfigError(f"model.layers={layers}: the model has {config.num_hidden_layers} layers")
    config.num_hidden_layers = layers


# names of query and value projections, as in PEFT
QUERY_VALUE = ("q_proj,v_proj", "c_attn", "query_key_value")


@READS_TOKENS
@NARROW.where(lambda it: few_bits(it["base"]))
@QUANTIZED.where(lambda it: it["base"] in BITS and few_bits(it["base"]))
@BFLOAT16.where(lambda it: it["base"] == "bfloat16")
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
) -> BuiltModel:
    """Load a causal language model (Llama, Qwen, GPT-2, SmolLM, ...), or build one at random.

    Args:
        shape: Must be empty: the data are token ids.
        classes: Number of different tokens of the data.
        seed: The seed of the run; random weights are drawn from it.
        path: A folder, a GGUF file, ``package:NAME/path`` or ``hub:NAME``; only the last may
            download. A GGUF file is dequantized to ``base``: the weights stay rounded.
        config: Instead of ``path``: ``model_type`` and further keys of its configuration in
            transformers, for random weights; ``vocab_size`` defaults to that of the data.
        layers: Keep the first so many layers; None for all.
        dropout: Dropout of hidden states.
        attention: ``sdpa`` (one fused kernel) or ``eager`` (plain products).
        base: Precision of the weights: ``float32``; or, for methods that never merge,
            ``bfloat16``, ``int8`` or ``int4`` (`fedraclora.models.built.held_in`).
        checkpointing: Keep only the inputs of each block for the backward pass, and recompute the
            rest: less memory, about a third more time.
        sha256: SHA-256 of the GGUF file, or of ``model.safetensors`` in the folder, or None.

    Returns:
        The model. Its head is the output layer; if that is tied to the token embedding, it can only
        be frozen. The targets are the projections of query and value.

    Raises:
        ConfigError: If a key is wrong, naming it, or the model takes no dropout.
        DataError: If the model is missing, damaged or not whole, or its weights are another file.
        ModelError: If the model has no output layer over tokens.
    """
    require_input("causal_lm", shape, classes, text=True)
    if (path is None) == (config is None):
        raise ConfigError(
            f"model.path={path} and model.config={config}: set one of them. A path loads "
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
    return held_in(BuiltModel(network, (_head(model),), found_targets(network, *QUERY_VALUE)), base)


def _drawn(
    config: Mapping[str, object],
    classes: int,
    seed: int,
    prepare: Callable[[Any], None],
    attention: str,
) -> Any:
    """Build a model with random weights from a configuration."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, rest = config.get("model_type"), {k: v for k, v in config.items() if k != "model_type"}
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise unknown("model.config.model_type", str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    # No token of these ends or pads a text by default: the tokenizer says which do.
    free = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    try:
        given = CONFIG_MAPPING[kind](**{"vocab_size": classes, **free, **rest})
        prepare(given)
        with seeded(seed, "model"):
            return AutoModelForCausalLM.from_config(
                given,
                dtype=torch.float32,
                attn_implementation=attention,
                trust_remote_code=False,
            )
    except ConfigError:
        raise
    except Exception as error:  # each configuration has its own checks and errors
        raise ConfigError(f"model.config={dict(config)} makes no model: {error}") from error


def _prepare(config: Any, layers: int | None, dropout: float) -> None:
    set_dropout(config, dropout)
    cut_layers(config, layers)
    config.use_cache = False  # the cache of past tokens, which generation turns on itself


def _head(model: Any) -> str:
    """Return the name of the output layer."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and head is not None:
            return str(name)
    raise ModelError(f"{type(model).__name__} has no output layer over tokens")


@READS_TOKENS
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
) -> BuiltModel:
    """Build a GPT-2 that predicts the next token.

    Its output layer is not tied to the token embedding, as it is in the original, so that it can be
    trained separately.

    Args:
        shape: Must be empty: the data are token ids.
        classes: Number of different tokens.
        seed: The seed of the run.
        hidden: Width, a multiple of ``heads``.
        layers: Number of layers.
        heads: Attention heads.
        max_length: Longest input.
        dropout: Dropout of embeddings and of each block's outputs.
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
        attn_pdrop=0.0,  # applied as a function, so that no mask can be keyed by client and step
        bos_token_id=None,
        eos_token_id=None,
        # GPT-2's own activation, as one kernel instead of eight
        activation_function="gelu_pytorch_tanh",
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=attention,
    )
    with seeded(seed, "model"):
        return BuiltModel(GPT2LMHeadModel(config).train(), ("lm_head",), "all-linear")
