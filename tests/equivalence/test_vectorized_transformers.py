"""A batch of clients comes to what each comes to alone: models of transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from vectorized_agreement import LOCAL, method_of, run
from vectorized_cases import LENGTH, SEED, SIZES, WORDS, Case, classes, task_of, words

from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.rng import generator
from fedraclora.training.vmapped import masks_written_out

CAUSAL = {("llama", "sdpa"), ("gpt2", "sdpa")}  # in the short suite


def causal(kind: str, attention: str = "sdpa") -> Case:
    """A causal model of transformers on padded texts: a classifier, or one of the next token."""
    import transformers

    lengths = torch.from_numpy(generator(SEED, "lengths").integers(2, LENGTH, sum(SIZES)))
    mask = torch.arange(LENGTH) < lengths[:, None]
    inputs = {"input_ids": words(least=2) * mask, "attention_mask": mask.long()}
    common = {"vocab_size": WORDS, "num_labels": 3, "pad_token_id": 0, "bos_token_id": None}
    common |= {"eos_token_id": None, "attn_implementation": attention}
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    if kind == "gpt2":
        sizes = {"n_positions": LENGTH, "n_embd": 8, "n_layer": 2, "n_head": 2}
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        tied = transformers.GPT2LMHeadModel(transformers.GPT2Config(**common, **sizes, **still))
        target = torch.where(mask, inputs["input_ids"], IGNORED_TOKEN)
        task = task_of(tied, inputs, target, head=("lm_head",), loss="next_token")
        return Case(task, head="frozen")
    if kind == "mistral":  # a window shorter than the text
        config = transformers.MistralConfig(**common, **small, head_dim=4, sliding_window=2)
        model: nn.Module = transformers.MistralForSequenceClassification(config)
    else:
        model = transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**common, **small)
        )
    return Case(task_of(model, inputs, classes(3), head=("score",)), head="full")


@pytest.mark.short(when=lambda kind, attention: (kind, attention) in CAUSAL)
@pytest.mark.parametrize("name", ["fedavg", "fedavg_lora"])
@pytest.mark.parametrize(
    ("kind", "attention"),
    [("llama", "sdpa"), ("gpt2", "sdpa"), ("mistral", "sdpa"), ("llama", "eager")],
)
def test_causal_models_train_as_one_batch(
    name: str, kind: str, attention: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = causal(kind, attention)
    norms = "ln_1,ln_2,ln_f" if kind == "gpt2" else "*norm"
    if name != "fedavg":
        case = replace(case, dense=norms)
    run(case, method_of(name), LOCAL, rounds=2, check={2})
    assert not caplog.records  # not one client after another


def test_the_masks_of_transformers_are_its_own_again() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as TABLE

    before = TABLE["sdpa"], TABLE["eager"]
    with masks_written_out():
        assert not {TABLE["sdpa"], TABLE["eager"]} & {*before}
    assert (TABLE["sdpa"], TABLE["eager"]) == before
