"""Whole runs on a base in int8 or int4: what they measure, write, go on from, and give away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from test_causal_lm import LLAMA, build
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import fedraclora
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError
from fedraclora.evaluation.evaluate import evaluate
from fedraclora.models.built import dequantize, seeded
from fedraclora.models.hf import build_hf
from fedraclora.narrow_weight import QuantisedWeight, base_name

WORDS = ("rounds=2", "bias=frozen", "model.config.hidden_size=32")
WIDE = {**LLAMA, "hidden_size": 32}


@pytest.fixture
def given(questions: Path, tokenizer: str) -> tuple[str, ...]:
    found = (f"data.file={questions}", "data.client=who", f"data.tokenizer={tokenizer}")
    return ("experiment=tiny_instructions", *found, *WORDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("int8", "ffa_lora"),
        pytest.param("int4", "fedavg_lora", marks=pytest.mark.long),
        pytest.param("int8", "fedsa_lora", marks=pytest.mark.long),
    ],
)
def test_a_quantized_base_stays_as_it_is(base: str, method: str, given: tuple[str, ...]) -> None:
    words = (*given, f"method={method}", "target_modules=[q_proj,v_proj]", "evaluate.generate=null")
    runs = [fedraclora.simulate(*words, f"model.base={name}") for name in ("float32", base)]
    wide, narrow = (run.summary["chunk_plan"] for run in runs)
    matrices = sum(w.numel() for n, w in runs[0].weights().items() if "proj" in n)
    saved = matrices * (4 - {"int8": 1, "int4": 0.5}[base])  # less the scales
    assert wide["weights"] - saved < narrow["weights"] < wide["weights"] - 0.8 * saved
    assert narrow["trained"] == wide["trained"]
    name = "personal_loss" if method == "fedsa_lora" else "loss"
    losses = [run.summary["metrics"][name] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.3)
    assert losses[1] < 0.98 * next(iter(runs[1].rows[0]["metrics"].values()))
    if method == "fedsa_lora":
        return
    held = dict(build(config=WIDE, base=base).model.named_parameters())
    for n, weight in runs[1].weights().items():
        assert type(weight) is torch.Tensor
        assert torch.equal(weight, held[n].detach()) == ("q_proj" not in n and "v_proj" not in n)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_a_run_goes_on_and_is_exported(given: tuple[str, ...], tmp_path: Path) -> None:
    """The folder holds codes, once; an adapter is exact beside the weights dequantized."""
    keys: dict[str, Any] = {
        "model": {"base": "int8"},
        "method": "fedavg_lora",
        "output": {"chain": True, "checkpoint_every": 1},
    }
    whole = fedraclora.simulate(*given, **keys, folder=tmp_path / "whole")
    first = tmp_path / "whole" / "chain" / "000000.safetensors"
    with safe_open(first, framework="pt") as file:
        stored = {n: file.get_tensor(n).dtype for n in file.keys()}  # noqa: SIM118
    name = "model.layers.1.mlp.up_proj.weight"
    assert stored[f"{name}|codes"] == torch.int8
    assert name not in stored
    half = tmp_path / "half"

    class Killed(Exception):
        pass

    def kill(row: Any) -> None:
        if row["round"] == 1:
            raise Killed

    with pytest.raises(Killed):
        fedraclora.simulate(*given, **keys, folder=half, on_round=kill)
    again = fedraclora.simulate(*given, **keys, folder=half, resume=True)
    assert again.summary["weights_digest"] == whole.summary["weights_digest"]

    trained, adapter, merged = whole.model(), tmp_path / "adapter", tmp_path / "merged"
    whole.export(adapter, "peft")
    whole.export(merged, "hf")
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = dequantize(build(config=WIDE, base="int8").model)
    assert all(torch.equal(w, plain.get_parameter(n)) for n, w in start.named_parameters())
    loaded = PeftModel.from_pretrained(start, adapter).merge_and_unload()
    for model in (loaded, AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)):
        for n, weight in trained.named_parameters():
            torch.testing.assert_close(model.get_parameter(n), weight, rtol=0, atol=1e-6)
    assert "held weights in int8" in (merged / "README.md").read_text()
    metrics = whole.evaluate()
    assert metrics["loss"] == pytest.approx(whole.summary["metrics"]["loss"], rel=1e-5)


@pytest.mark.long
def test_rays_workers_hold_the_codes(given: tuple[str, ...]) -> None:
    words = (*given, "method=fedavg_lora", "model.base=int4")
    runs = [fedraclora.simulate(*words, f"engine={engine}") for engine in ("vectorized", "ray")]
    assert len({run.summary["weights_digest"] for run in runs}) == 1


def test_a_classifier_has_a_narrow_base_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = BertConfig(**sizes, intermediate_size=64, vocab_size=30, max_position_embeddings=9)
    with seeded(0, "test"):  # of one draw in hundreds int8 has the loss of float32, to the bit
        BertForSequenceClassification(small).save_pretrained(tmp_path)
    given: dict[str, Any] = {"shape": (), "classes": 3, "seed": 0, "path": str(tmp_path)}
    whole = build_hf(**given).model
    ids = torch.randint(0, 30, (8, 9), generator=torch.Generator().manual_seed(1))
    samples = Samples({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 0] % 3)
    losses = {}
    for base in ("float32", "int8", "int4"):
        built = build_hf(**given, base=base)
        held = dict(built.model.named_parameters())
        narrow = {n for n, w in held.items() if isinstance(w, QuantisedWeight)}
        assert built.narrow == (base != "float32")
        assert {base_name(held[n]) for n in narrow} == ({base} - {"float32"})
        assert len(narrow) == (0 if base == "float32" else 7)  # six of the block, and the pooler
        assert not any(n.startswith(("classifier", "bert.embeddings")) for n in narrow)
        weights = {n: w.detach() for n, w in held.items()}
        losses[base] = evaluate(built.model, weights, samples, "cross_entropy", ("loss",), 4)
        assert all(torch.allclose(w, whole.get_parameter(n), atol=0.01) for n, w in weights.items())
    assert len({found["loss"] for found in losses.values()}) == 3
    assert losses["int4"]["loss"] == pytest.approx(losses["float32"]["loss"], rel=0.05)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=fed_rac_lora"], r"merges updates into the weights .*int8"),
        (["method=fedavg_lora", "dora=true"], r"dora=true .*int8"),
        (["method=fedavg_lora", "server_optimizer=adam"], "server_optimizer.space=weights"),
        (["method=fedavg_lora", "method.init=lora_ga"], "first factors out of the weights"),
        (["method=fedavg_lora", "method.init=pissa"], "first factors out of the weights"),
        (["method=fedavg_lora", "allocation=adalora"], "merges updates into the weights"),
        (["method=ffa_lora", "modules_to_save=[o_proj]"], r"trained in full .*o_proj\.weight"),
        (["method=ffa_lora", "pretrain=table3"], "cannot be trained"),
    ],
)
def test_what_would_change_it_is_refused(
    words: list[str], said: str, given: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match=said):
        fedraclora.simulate(*given, "model.base=int8", *words)


@pytest.mark.slow
def test_a_start_is_not_merged_into_it(given: tuple[str, ...], tmp_path: Path) -> None:
    run = fedraclora.simulate(*given, "rounds=1", "method=fedavg_lora", "evaluate.generate=null")
    run.export(tmp_path / "adapter", "peft")
    words = (*given, "method=fedavg_lora", "model.base=int8", f"init_from={tmp_path / 'adapter'}")
    with pytest.raises(ConfigError, match=r"model\.base=int8 or int4 does not go with init_from"):
        fedraclora.simulate(*words)


def test_a_model_without_linear_layers_is_refused() -> None:
    no_layers = {**LLAMA, "num_hidden_layers": 0}
    with pytest.raises(ConfigError, match=r"int8.*LlamaForCausalLM has none"):
        build(config=no_layers, base="int8")
    with pytest.raises(ConfigError, match=r"in groups of 32.*q_proj\.weight have 16"):
        build(base="int4")
