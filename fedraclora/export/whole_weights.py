"""Export full weights: a Hugging Face folder, a state dict, or a GGUF file for Llama models.

GGUF is float32, for llama.cpp and tools built on it. Its tokenizer is copied from the GGUF file
from which the run began: GGUF names the rule by which a tokenizer splits text before its merges,
and transformers' files do not have that name. For other models, use llama.cpp's own converter on a
Hugging Face folder.

References:
    llama.cpp, ``convert_hf_to_gguf.py`` (the order of rows of query and key).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedraclora.data.locate import from_pretrained
from fedraclora.errors import ConfigError, DataError, ModelError
from fedraclora.export.trained import ExportRecord, Order, TrainedModel, is_hugging_face
from fedraclora.imports import import_extra
from fedraclora.weights.files import save_tensors


def write_hf(trained: TrainedModel, order: Order) -> ExportRecord:
    """Write the merged model with ``save_pretrained``, and its tokenizer if it has one.

    Args:
        trained: What the run trained.
        order: Where to.

    Raises:
        ConfigError: If the model is not from transformers.
        ModelError: If transformers does not read back what was written.
    """
    model: Any = trained.model
    if not is_hugging_face(model):
        raise ConfigError(
            f"a {type(model).__name__} is no model of transformers, and has no Hugging Face "
            "folder: take --format state_dict, or peft"
        )
    save_model(model, order.folder, trained)
    if not order.check:
        return {}
    again: Any = type(model).from_pretrained(
        order.folder, dtype=None, local_files_only=True, trust_remote_code=False
    )
    found = again.state_dict()
    for name, value in model.state_dict().items():
        if name not in found or not torch.equal(found[name], value):
            raise ModelError(
                f"transformers does not give {name} back as it was trained (it ties it to another "
                "weight): take --format state_dict"
            )
    return {}


def save_model(model: nn.Module, folder: Path, trained: TrainedModel) -> None:
    """Write a transformers model, and a copy of its tokenizer, if there is one.

    Raises:
        DataError: If the tokenizer of the data cannot be read.
    """
    from transformers import AutoTokenizer

    known: Any = model
    known.save_pretrained(folder)
    if trained.tokenizer is None:
        return
    try:
        local = Path(trained.tokenizer).exists()
        tokenizer = from_pretrained(AutoTokenizer, trained.tokenizer, local, "data.tokenizer")
        if tokenizer.pad_token is None:  # as in training
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
    except (ConfigError, DataError):
        if trained.tokenizer != trained.source:  # a model's folder may have none
            raise


def write_state_dict(trained: TrainedModel, order: Order) -> ExportRecord:
    """Write ``model.safetensors``: parameters and buffers, tied ones under each of their names.

    Args:
        trained: What the run trained.
        order: Where to.
    """
    tensors = trained.model.state_dict()
    digest = {"weights_digest": trained.facts.get("weights_digest")}
    save_tensors(order.folder / "model.safetensors", tensors, digest, sync=False)
    return {}


GGUF_FILE = "model.gguf"
CONVERTER = (
    "export --format hf, and convert that folder with llama.cpp: "
    "python convert_hf_to_gguf.py FOLDER --outfile model.gguf"
)


def write_gguf(trained: TrainedModel, order: Order) -> ExportRecord:
    """Write ``model.gguf``.

    Args:
        trained: What the run trained.
        order: Where to.

    Raises:
        ConfigError: If the model is of another form, its tokenizer cannot be written, or the
            package gguf is not installed.
        ModelError: If transformers does not read back what was written.
    """
    gguf = import_extra("gguf", "--format gguf")
    config = _config(trained)
    writer: Any = gguf.GGUFWriter(order.folder / GGUF_FILE, "llama")
    _describe(writer, config)
    _add_tokenizer(writer, gguf, trained.tokenizer)
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in trained.weights.items():
        found = names.get_name(name, try_suffixes=(".weight",))
        if found is None:
            raise ConfigError(f"GGUF has no name for {name} in a model of Llama form; {CONVERTER}")
        writer.add_tensor(found, _rows(name, weight.float(), config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if order.check:
        _hold(trained, order.folder)
    return {"file": GGUF_FILE, "dtype": "float32"}


def _config(trained: TrainedModel) -> Any:
    """Return the configuration of a model that GGUF supports.

    Raises:
        ConfigError: If it is not a plain Llama model.
    """
    config: Any = getattr(trained.model, "config", None)
    kind = type(trained.model).__name__
    if kind != "LlamaForCausalLM":
        raise ConfigError(f"a {kind} is not written as GGUF here, LlamaForCausalLM is; {CONVERTER}")
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default" or config.attention_bias or config.mlp_bias:
        raise ConfigError(f"this Llama has scaled rotary embeddings or biases; {CONVERTER}")
    return config


def _describe(writer: Any, config: Any) -> None:
    """Write the metadata of the architecture."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # The last part of a local path or a hub name.
    name = Path(str(getattr(config, "name_or_path", ""))).name
    writer.add_name(name.removesuffix(".gguf") or "fedraclora")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(0)  # all float32


def _add_tokenizer(writer: Any, gguf: Any, source: str | None) -> None:
    """Copy the tokenizer of a GGUF file; without one, the file says that it has none.

    Raises:
        ConfigError: If the tokenizer is of another kind of file.
    """
    if source is None:
        writer.add_tokenizer_model("no_vocab")
        return
    if not source.endswith(".gguf"):
        raise ConfigError(
            f"the tokenizer of {source} cannot be written as GGUF here, where the name of its way "
            f"to split text is not known; {CONVERTER}"
        )
    for key, entry in gguf.GGUFReader(source).fields.items():
        if key.startswith("tokenizer."):
            sub = entry.types[-1] if len(entry.types) > 1 else None
            writer.add_key_value(key, entry.contents(), entry.types[0], sub_type=sub)


def _rows(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Permute rows of query and key into llama.cpp's order: the halves of a head alternate."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return weight
    halves = weight.reshape(count, 2, weight.shape[0] // count // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _hold(trained: TrainedModel, folder: Path) -> None:
    """Read the file back through transformers, and compare the weights."""
    from transformers import LlamaForCausalLM

    again: Any = LlamaForCausalLM.from_pretrained(
        folder, gguf_file=GGUF_FILE, dtype=torch.float32, trust_remote_code=False
    )
    found = dict(again.named_parameters())
    for name, weight in trained.weights.items():
        if name not in found or not torch.equal(found[name], weight.float()):
            raise ModelError(
                f"transformers does not give {name} back from {GGUF_FILE}; {CONVERTER}"
            )
