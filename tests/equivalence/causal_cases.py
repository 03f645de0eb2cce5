"""Tiny causal language models of the three common forms, on texts with labelled answers."""

from __future__ import annotations

from dataclasses import replace

import torch
from vectorized_cases import SEED, SIZES, Case, task_of

from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.task import Task
from fedraclora.models.built import held_in
from fedraclora.models.hf import build_causal_lm
from fedraclora.rng import generator

TOKENS, WIDTH = 23, 9

LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": WIDTH}
CONFIGS: dict[str, dict[str, object]] = {
    "llama": LLAMA,  # rotary positions, RMSNorm, grouped queries, tied embeddings
    "qwen2": {
        **LLAMA,
        "model_type": "qwen2",
        "tie_word_embeddings": False,
    },  # and biases of q, k, v
    "gpt2": GPT2,  # Conv1D, LayerNorm, tied embeddings
}
TARGETS = {"llama": "q_proj,v_proj", "qwen2": "all-linear", "gpt2": "c_attn,c_proj"}


def causal_task(kind: str, base: str = "float32", **more: object) -> Task:
    """Texts of unequal length, of unequal clients, whose last tokens are the answer."""
    draw = generator(SEED, "answers")
    total = sum(SIZES)
    lengths = torch.from_numpy(draw.integers(4, WIDTH + 1, total))
    prompts = torch.from_numpy(draw.integers(1, 4, total))
    ids = torch.from_numpy(draw.integers(1, TOKENS, (total, WIDTH)))
    place = torch.arange(WIDTH)
    mask = place < lengths[:, None]
    labels = torch.where(mask & (place >= prompts[:, None]), ids, IGNORED_TOKEN)
    built = build_causal_lm(
        shape=(),
        classes=TOKENS,
        seed=0,
        config=CONFIGS[kind],
        **more,  # type: ignore[arg-type]
    )
    inputs = {"input_ids": ids * mask, "attention_mask": mask.long()}
    task = task_of(built.model, inputs, labels, head=built.head, loss="next_token")
    if base != "float32":  # once the weights are large enough
        held_in(replace(built, model=task.model), base)
    return task


def causal_case(kind: str, **more: object) -> Case:
    return Case(causal_task(kind, **more), targets=TARGETS[kind], head="frozen", bias="frozen")
