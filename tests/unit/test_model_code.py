"""Code in the folder of a model or tokenizer, which transformers would run after a yes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import BertConfig, BertForSequenceClassification, modeling_utils

import fedraclora
from fedraclora.commands import cli
from fedraclora.commands.check import check_node
from fedraclora.compose.overrides import composed
from fedraclora.data.locate import load_tokenizer
from fedraclora.errors import ConfigError, FedRacLoraError
from fedraclora.export.peft_adapter import _loaded
from fedraclora.models.built import seeded
from fedraclora.models.hf import build_causal_lm, build_hf
from fedraclora.run.digests import write_digests
from fedraclora.strategies.weights import load_weights

OWN = """
import pathlib
pathlib.Path({canary!r}).write_text("ran")
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
class Config(BertConfig): model_type = "own_kind"
class Model(BertForSequenceClassification): config_class = Config
class Words(BertTokenizer): pass
"""
KINDS = {  # of configurations: one that transformers has no class for, and one without this head
    "unknown": {"model_type": "own_kind", "auto_map": {"AutoConfig": "own.Config"}},
    "headless": {
        "model_type": "vit_mae",
        "auto_map": {
            "AutoModelForSequenceClassification": "own.Model",
            "AutoModelForCausalLM": "own.Model",
        },
    },
}


@pytest.fixture(params=KINDS)
def theirs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with code in it; whoever asks on the terminal hears yes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(KINDS[request.param]))
    tokenizer = {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": ["own.Words", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "own.py").write_text(OWN.format(canary=str(tmp_path / "canary")))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    return folder


def load_words(path: str, shape: tuple[int, ...], classes: int, seed: int) -> object:
    return load_tokenizer(path, None)


@pytest.mark.parametrize("load", [build_hf, build_causal_lm, load_words])
def test_code_of_a_models_folder_is_not_run(
    load: Callable[..., object], theirs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="its own code") as error:
        load(path=str(theirs), shape=(), classes=2, seed=0)
    key = "data.tokenizer" if load is load_words else "model.path"
    assert f"{key}={theirs}" in str(error.value)
    assert not (tmp_path / "canary").exists()
    assert sys.stdin.read() == "y\n" * 20  # nobody was asked


def words_of(theirs: Path, tmp_path: Path) -> list[str]:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"a word {n},{n % 2}\n" for n in range(40)))
    return [
        *("data=text", f"data.file={file}", "data.text=[text]", "data.label=label"),
        *("data.test_fraction=0.2", "model=minilm", f"model.path={theirs}", "model.sha256=null"),
        *(
            "partition=iid",
            "pretrain=none",
            "clients=2",
            "clients_per_round=2",
            "rounds=1",
            "local.lr=0.1",
        ),
    ]


def run_folder(theirs: Path, tmp_path: Path) -> Path:
    """The folder of a run that was poisoned: its config names the model's folder."""
    folder = tmp_path / "run"
    small = ("data=digits", "data.labels=null", "pretrain=none", "partition=iid", "rounds=1")
    fedraclora.simulate(
        *small, "clients=2", "clients_per_round=2", "model.hidden=[4]", folder=folder
    )
    text = yaml.safe_dump(composed(words_of(theirs, tmp_path)), sort_keys=False)
    write_digests(folder, text, None)
    (folder / "config.yaml").write_text(text)
    return folder


@pytest.mark.slow
def test_no_command_runs_code_of_a_models_folder(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(run_folder(theirs, tmp_path))
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    preset = {
        "model": {"path": str(theirs), "sha256": None},
        "defaults": [{"override /model": "minilm"}],
    }
    text = f"# @package _global_\n{yaml.safe_dump(preset, sort_keys=False)}"
    (tmp_path / "conf" / "experiment" / "p.yaml").write_text(text)
    some = [w for w in words_of(theirs, tmp_path) if not w.startswith("model")]
    for words in (
        ("evaluate", run),
        ("predict", run, "--data", "test"),
        ("export", run, "--format", "hf"),
        ("simulate", f"resume={run}", "rounds=2"),
        ("simulate", "--config-dir", str(tmp_path / "conf"), "experiment=p", *some),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 1, words
        said = capsys.readouterr().err
        assert f"data.tokenizer={theirs}" in said or f"model.path={theirs}" in said, said
        assert not (tmp_path / "canary").exists(), words
    for read in (fedraclora.read_run, load_weights):
        with suppress(FedRacLoraError):
            read(run)
        assert not (tmp_path / "canary").exists()


def test_a_check_of_a_node_runs_no_code_of_a_models_folder(theirs: Path, tmp_path: Path) -> None:
    file = tmp_path / "check.yaml"
    config = composed(words_of(theirs, tmp_path))
    file.write_text(yaml.safe_dump({"versions": {}, "config": config}))
    words = ["--superlink", "127.0.0.1:9", "--insecure", "--node-config", "partition-id=0"]
    check_node(words, str(file))
    assert not (tmp_path / "canary").exists()


def test_attention_that_a_models_folder_names_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    with seeded(0, "test"):
        BertForSequenceClassification(BertConfig(**small, intermediate_size=8)).save_pretrained(
            tmp_path / "model"
        )
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text()) | {"attn_implementation": "theirs/kernel"}
    file.write_text(json.dumps(config))
    fetched = list[object]()
    monkeypatch.setattr(modeling_utils, "is_kernel", lambda name: fetched.append(name) or False)
    built = build_hf(path=str(tmp_path / "model"), shape=(), classes=2, seed=0)
    start = {n: p.detach() for n, p in built.model.named_parameters()}
    trained = SimpleNamespace(model=built.model, start=start)
    assert _loaded(trained, str(tmp_path / "model")) is not None  # type: ignore[arg-type]
    assert fetched
    assert "theirs/kernel" not in fetched
