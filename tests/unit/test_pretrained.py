"""Stored models: what is built is what is stored, to the last number, or the error names it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fedraclora
from fedraclora.errors import ConfigError, DataError
from fedraclora.models.hf import build_causal_lm, build_hf
from tests.campaigns.stored_models import bert, gguf_of, llama, write_gguf
from tests.unit.test_export import texts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
Tensors = dict[str, torch.Tensor]


def build(path: Path, kind: Callable[..., Any] = build_causal_lm, **keys: Any) -> Any:
    return kind(shape=(), classes=3, seed=0, path=str(path), **keys)


def changed(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


FOLDERS: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "a weight is missing": (
        "llama",
        lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"),
        "it has no model.layers.1.self_attn.q_proj.weight",
    ),
    "the output layer is missing": ("llama", lambda t: t.pop("lm_head.weight"), "no lm_head"),
    "of an encoder": ("bert", lambda t: t.pop("encoder.layer.0.output.dense.bias"), "it has no "),
    "another shape": (
        "bert",
        lambda t: t.update({"embeddings.word_embeddings.weight": torch.ones(9, 16)}),
        r"word_embeddings.weight is (9, 16), expected (20, 16)",
    ),
    "too many": (
        "bert",
        lambda t: t.update({"encoder.layer.2.output.dense.bias": torch.ones(16)}),
        "has no place for its",
    ),
    "not finite": (
        "llama",
        lambda t: t["model.norm.weight"].fill_(torch.nan),
        "model.norm.weight has values that are not finite",
    ),
    "whole numbers": (
        "bert",
        lambda t: t.update({"pooler.dense.bias": torch.ones(16, dtype=torch.int64)}),
        "pooler.dense.bias holds I64",
    ),
    "half a head": (
        "bert",
        lambda t: t.update({"classifier.weight": torch.ones(3, 16)}),
        "of its head, classifier is not stored whole",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_not_the_whole_model_is_refused(case: str, tmp_path: Path) -> None:
    kind, change, said = FOLDERS[case]
    model = bert() if kind == "bert" else llama(tied=False)
    model.save_pretrained(tmp_path)
    builder = build_hf if kind == "bert" else build_causal_lm
    build(tmp_path, builder)
    changed(tmp_path, change)
    with pytest.raises(DataError, match=re.escape(said)):
        build(tmp_path, builder)


Keys, Arrays = dict[str, Any], dict[str, np.ndarray]
FILES: dict[str, tuple[Callable[[Keys, Arrays], object], str]] = {
    "tensors are missing": (lambda k, t: t.pop("blk.1.attn_q.weight"), "it has no model.layers.1"),
    "no tensor": (lambda k, t: t.clear(), "holds no tensor"),
    "too many layers": (lambda k, t: k.update({"llama.block_count": 100000}), "100000 layers"),
    "too few layers": (lambda k, t: k.update({"llama.block_count": 1}), "of which a Llama"),
    "too wide": (lambda k, t: k.update({"llama.embedding_length": 2**24}), "are stored"),
    "nan": (lambda k, t: k.update({"llama.rope.freq_base": float("nan")}), "rope_theta is nan"),
    "scaled": (lambda k, t: k.update({"llama.rope.scaling.type": "yarn"}), "rope.scaling.type"),
    "a bias": (lambda k, t: t.update({"blk.0.attn_q.bias": t["output_norm.weight"]}), "hold"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_gguf_file_whose_header_is_not_its_content_is_refused(case: str, tmp_path: Path) -> None:
    change, said = FILES[case]
    path = tmp_path / "it.gguf"
    keys, tensors = gguf_of(llama(tied=True))
    write_gguf(path, keys, tensors)
    build(path)
    change(keys, tensors)
    write_gguf(path, keys, tensors)
    for builder in (build_causal_lm, build_hf):
        with pytest.raises(DataError, match=re.escape(said)) as caught:
            build(path, builder)
        assert "it.gguf" in str(caught.value)


def test_fewer_layers_of_a_whole_file_are_no_gap(tmp_path: Path) -> None:
    model = llama(tied=False)
    model.config.eos_token_id = 2  # a classifier pads with it
    write_gguf(tmp_path / "it.gguf", *gguf_of(model))
    model.save_pretrained(tmp_path / "it")
    for path in (tmp_path / "it.gguf", tmp_path / "it"):
        for kind in (build_causal_lm, build_hf):
            found = build(path, kind, layers=1).model
            assert torch.equal(found.model.norm.weight, model.model.norm.weight)
            assert len(found.model.layers) == 1


def test_a_stored_head_of_other_outputs_is_drawn_anew_whole(tmp_path: Path) -> None:
    build_hf(shape=(), classes=5, seed=1, path=str(stored_bert(tmp_path))).model.save_pretrained(
        tmp_path / "five"
    )
    fitting = build_hf(shape=(), classes=5, seed=0, path=str(tmp_path / "five"))
    other = build_hf(shape=(), classes=3, seed=0, path=str(tmp_path / "five"))
    assert fitting.drawn == ()
    assert other.drawn == ("classifier.weight", "classifier.bias")


def test_a_pooler_that_is_not_there_is_drawn_and_named_and_half_of_one_is_refused(
    tmp_path: Path,
) -> None:
    folder = stored_bert(tmp_path)
    changed(folder, lambda t: t.pop("pooler.dense.bias"))
    with pytest.raises(DataError, match=r"bert\.pooler\.dense .*whole"):
        build(folder, build_hf)
    changed(folder, lambda t: t.pop("pooler.dense.weight"))
    assert set(build(folder, build_hf).drawn) == {
        *("bert.pooler.dense.weight", "bert.pooler.dense.bias"),
        *("classifier.weight", "classifier.bias"),
    }


def stored_bert(folder: Path) -> Path:
    bert().save_pretrained(folder / "bert")
    return folder / "bert"


def test_a_new_head_is_named_before_the_first_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, target = texts(40)
    fit = {name: value.clamp(max=19) for name, value in inputs.items()}
    halves = [({n: v[k::2] for n, v in fit.items()}, target[k::2]) for k in range(2)]
    run = fedraclora.simulate(
        "output.verbose=true",
        model={"name": "hf", "path": str(stored_bert(tmp_path))},
        data=halves,
        test=({n: v[:9].flip(1) for n, v in fit.items()}, target[:9]),
        method={"name": "fed_rac_lora", "rank": 1},
        rounds=0,
    )
    assert "classifier.weight, classifier.bias" in capsys.readouterr().err
    assert "classifier.weight" in run.summary["task"]["new_head"]


def test_quantized_folders_are_refused_by_both_builders(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.config.save_pretrained(tmp_path)
    for kind in (build_causal_lm, build_hf):
        with pytest.raises(ConfigError, match="its weights are quantized"):
            build(tmp_path, kind)
