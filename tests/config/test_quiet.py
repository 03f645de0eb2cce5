"""What a new user reads in a terminal: a few sentences, and no reports of libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FIRST = 8  # lines before round 1, that of round 0 included
FORBIDDEN = ("Loading weights", "LOAD REPORT", "FutureWarning", "DeprecationWarning", "it/s]")
SMALL = ("clients=4", "clients_per_round=2", "rounds=1", "output.plots=false")


def said(folder: Path, *words: str, command: str = "simulate") -> list[str]:
    """Lines of both streams of a command in a process of its own."""
    typed = [sys.executable, "-m", "fedraclora.commands.cli", command, *words]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*typed, f"output.dir={folder}"], capture_output=True, text=True, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr
    text = done.stderr + done.stdout
    assert [part for part in FORBIDDEN if part in text] == []
    return text.replace("\r", "\n").splitlines()


def before_round_1(lines: list[str]) -> list[str]:
    there = [line.startswith("round 1 of ") for line in lines].index(True)
    return [line for line in lines[:there] if not line.startswith("still ")]  # on a slow machine


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored encoder of Hugging Face with its tokenizer, whose head is to be drawn."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "good", "bad", "film"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("model")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=5, intermediate_size=8, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    rows = [f"{'good' if k % 3 else 'bad'} film {k},{int(bool(k % 3))}" for k in range(60)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


@pytest.mark.slow
def test_a_run_begins_with_a_few_lines(tmp_path: Path) -> None:
    lines = said(tmp_path / "run", *SMALL, "data=digits", "pretrain=none")
    first = before_round_1(lines)
    assert len(first) <= FIRST
    for part in ("2 of 4 clients", "training samples", "sends", str(tmp_path / "run")):
        assert any(part in line for line in first), part


@pytest.mark.slow
def test_a_model_of_hugging_face_is_loaded_quietly(
    classifier: Path, reviews: Path, tmp_path: Path
) -> None:
    words = ["data=text", f"data.file={reviews}", "data.label=label", "data.duplicates=keep"]
    words += [f"data.tokenizer={classifier}", "model=hf", f"model.path={classifier}"]
    words += ["partition=iid", "pretrain=none"]
    assert len(before_round_1(said(tmp_path / "run", *SMALL, *words))) <= FIRST
    assert "new head:" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.slow
def test_all_is_shown_where_that_is_asked_for(tmp_path: Path) -> None:
    lines = said(tmp_path, *SMALL, "data=digits", "pretrain=none", "-v")
    assert any(line.startswith("chunk:") for line in lines)


@pytest.mark.slow
def test_on_ray_a_run_begins_with_as_few(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = ["data=digits", "pretrain=none", "engine=ray", "engine.workers=1"]
    assert len(before_round_1(said(tmp_path, *SMALL, *words))) <= FIRST


@pytest.mark.slow
def test_a_deployment_begins_with_as_few(tmp_path: Path) -> None:
    words = ["nodes=2", "data=digits", "pretrain=none", "rounds=1", "output.plots=false"]
    assert len(before_round_1(said(tmp_path / "run", *words, command="deploy"))) <= FIRST
    assert "chunk:" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.slow
def test_a_tuning_begins_with_as_few(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    words = ["data=digits", "pretrain=none", "clients=4", "clients_per_round=2", "rounds=1"]
    lines = said(tmp_path / "tuned", *words, "tune.runs=1", "tune.test_seeds=[0]", command="tune")
    first = [line.startswith("run 0: ") for line in lines].index(True)
    assert first <= FIRST
    assert "0.0625 to" in (tmp_path / "tuned" / "run.log").read_text()
