"""Exports: what other libraries load from them is the trained model, or a sentence says why not."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from torch import nn

import fedraclora
from fedraclora.commands import cli
from fedraclora.config.run_config import from_plain
from fedraclora.data.gguf_header import read_gguf_header
from fedraclora.data.task import forward
from fedraclora.errors import CheckpointError, ConfigError, ModelError
from fedraclora.evaluation.evaluate import evaluate
from fedraclora.export import FORMATS, peft_adapter, whole_weights
from fedraclora.models.built import seeded
from fedraclora.models.hf import build_gpt
from fedraclora.run.folder import read_config
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.runner import finished
from fedraclora.strategies.weights import load_weights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
QUIET = "output.progress=false"
ROUNDS, RANK = 3, 2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 12, generator=generator(seed))
    return x, (x[:, 0] + x[:, 1] > 0).long()


def texts(count: int, seed: int = 2) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.randint(3, 30, (count, 7), generator=generator(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (ids[:, 0] > 15).long()


def next_tokens(count: int, seed: int = 3) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.randint(0, 20, (count, 8), generator=generator(seed))
    return {"input_ids": ids[:, :-1]}, ids[:, 1:].clone()


def mlp() -> nn.Module:
    with seeded(0, "model"):
        return nn.Sequential(
            nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9), nn.LayerNorm(9), nn.Linear(9, 2)
        )


def gpt() -> nn.Module:
    sizes = {"hidden": 16, "layers": 2, "heads": 2, "max_length": 9}
    return build_gpt(shape=(), classes=20, seed=0, **sizes).model


BERT = {"hidden": 16, "layers": 2, "heads": 2, "intermediate": 24, "vocab": 30, "max_length": 9}
MODELS = {
    "mlp": (mlp, numbers),
    "bert": (lambda: {"name": "transformer", **BERT}, texts),
    "gpt": (gpt, next_tokens),
}


def trained(model: str, method: str, folder: Path | None = None, **keys: object):
    make, samples = MODELS[model]
    inputs, target = samples(80)
    if isinstance(inputs, dict):
        clients = [({n: t[k::4] for n, t in inputs.items()}, target[k::4]) for k in range(4)]
    else:
        clients = [(inputs[k::4], target[k::4]) for k in range(4)]
    more, rank = {}, {} if method == "fedavg" else {"rank": RANK}
    if " " in method:
        method, _, word = method.partition(" ")
        more = dict([word.split("=")])
    return fedraclora.simulate(
        *(QUIET, "engine.chunk=8", *(["output.plots=false"] if folder else [])),
        model=make(),
        data=clients,
        test=samples(30, 9),
        method={"name": method, **rank, **more},
        local={"lr": 0.1 if model == "mlp" else 1.0, "batch_size": 10},
        rounds=ROUNDS,
        folder=folder,
        **keys,
    )


def loaded(run, place: Path) -> nn.Module:
    """Load an adapter as its card says, and merge it."""
    base = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
    task = run.builder.built.task.model
    if base is None:
        model = copy.deepcopy(task)
        model.load_state_dict(load_file(place / "base.safetensors"))
    else:
        model = type(task).from_pretrained(base)
    return PeftModel.from_pretrained(model, place).merge_and_unload().eval()


def followed(place: Path, **given: object) -> dict[str, object]:
    """Run the lines of a card that load and use the model, from another folder than its own."""
    lines = "".join(
        re.findall(
            r"```python\n(.*?)```",
            (place / "README.md").read_text().partition("## Train it again")[0],
            re.DOTALL,
        )
    )
    for name in given:
        assert f"\n{name} = ...  #" in lines
        lines = lines.replace(f"\n{name} = ...  #", "\n#")
    names = dict(given)
    exec(lines.replace('folder = "."', f"folder = {str(place)!r}"), names)
    return names


def distance(model: nn.Module, weights: dict[str, torch.Tensor]) -> float:
    found = dict(model.named_parameters())
    assert found.keys() == weights.keys()
    return max(float((found[n] - w).detach().abs().max()) for n, w in weights.items())


CASES = {
    "mlp, a chain": ("mlp", "fed_rac_lora", {}),
    "mlp, factors that are carried": ("mlp", "fedavg_lora", {}),
    "mlp, re-factored products": ("mlp", "flexlora", {}),
    "mlp, magnitudes": ("mlp", "fedavg_lora", {"dora": True}),
    "mlp, everything in full": ("mlp", "fedavg", {"head": "full"}),
    "bert, head in full": ("bert", "fed_rac_lora", {"head": "full"}),
    "bert, head adapted": ("bert", "fedavg_lora", {"head": "lora"}),
    "bert, magnitudes": ("bert", "ffa_lora", {"dora": True, "head": "full"}),
    "bert, norms in full": (
        "bert",
        "flexlora",
        {"modules_to_save": ["LayerNorm"], "head": "frozen"},
    ),
    "gpt, a chain": ("gpt", "fed_rac_lora", {}),
    "gpt, carried, head in full": ("gpt", "fedavg_lora", {"head": "full"}),
    "gpt, magnitudes": ("gpt", "fedavg_lora", {"dora": True}),
    "gpt, embeddings": (
        "gpt",
        "fed_rac_lora",
        {"target_modules": ["wte", "c_attn"], "bias": "frozen"},
    ),
    "bert, residual base": ("bert", "fedavg_lora init=pissa", {}),
}


# The short suite has every kind of factor on one model, and every model.
@pytest.mark.short(when=lambda case: case.startswith("mlp") or "head" in case or "emb" in case)
@pytest.mark.parametrize("case", CASES)
def test_peft_merges_an_adapter_to_the_weights_and_the_metric_of_the_run(case, tmp_path):
    model, method, keys = CASES[case]
    run = trained(model, method, tmp_path / "run", **keys)
    record = run.export(tmp_path / "adapter")
    merged = loaded(run, tmp_path / "adapter")
    assert distance(merged, run.weights()) < 1e-6
    task = run.builder.built.task
    weights = {n: p.detach() for n, p in merged.named_parameters()}
    found = evaluate(merged, weights, task.test, task.loss, task.metrics)
    assert found == pytest.approx(run.summary["metrics"], abs=1e-5)
    with torch.no_grad():
        outputs = forward(merged, task.test.inputs)
    assert torch.allclose(outputs, forward(run.model(), task.test.inputs), atol=1e-5)
    for layer in record["layers"].values():
        assert layer["rank"] == layer["rank_of_change"]
        assert layer["relative_error"] < 1e-6
        assert layer["largest_difference"] < 1e-6


@pytest.mark.slow
def test_a_chain_has_the_rank_of_all_its_links_and_carried_factors_their_own(tmp_path):
    chain = trained("bert", "fed_rac_lora", tmp_path / "chain").export(tmp_path / "a")
    carried = trained("bert", "fedavg_lora", tmp_path / "carried").export(tmp_path / "b")
    inner = [n for n in chain["layers"] if n != "classifier"]
    assert {chain["layers"][n]["rank"] for n in inner} == {ROUNDS * RANK}
    assert {carried["layers"][n]["rank"] for n in inner} == {RANK}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == ROUNDS * RANK
    assert config["rank_pattern"] == config["alpha_pattern"] == {"classifier": RANK}
    assert config["bias"] == "lora_only"


@pytest.mark.parametrize("method", ["fed_rac_lora", "fedavg"])
def test_a_truncated_adapter_misses_what_its_record_says(method, tmp_path):
    run = trained("mlp", method, tmp_path / "run", head="full")
    errors = []
    for rank in (1, 3):
        record = run.export(tmp_path / f"{rank}", rank=rank)
        merged = dict(loaded(run, tmp_path / f"{rank}").named_parameters())
        start = load_weights(tmp_path / "run", 0)
        for name, layer in record["layers"].items():
            new, old = run.weights()[f"{name}.weight"], start[f"{name}.weight"]
            change = new - old
            best = torch.linalg.svdvals(change.double())[rank:].square().sum().sqrt()
            missed = torch.linalg.norm(new - merged[f"{name}.weight"].detach())
            assert layer["rank"] == rank
            assert missed == pytest.approx(float(best), abs=1e-6)  # Eckart-Young
            assert layer["relative_error"] == pytest.approx(
                float(best / torch.linalg.norm(change)), abs=1e-5
            )
        errors.append(max(layer["relative_error"] for layer in record["layers"].values()))
        assert "4" in record["saved_in_full"]  # the head is never truncated
        assert torch.equal(merged["4.weight"], run.weights()["4.weight"])
    assert errors[0] > errors[1] > 0
    assert f"{errors[1]:.2e}" in (tmp_path / "3" / "README.md").read_text()


def test_an_earlier_round_comes_from_the_chain(tmp_path):
    run = trained("mlp", "fed_rac_lora", tmp_path / "run")
    run.export(tmp_path / "first", round=1)
    assert distance(loaded(run, tmp_path / "first"), load_weights(run.folder, 1)) < 1e-6
    with pytest.raises(CheckpointError, match="not round 9"):
        run.export(tmp_path / "ninth", round=9)
    assert not (tmp_path / "ninth").exists()


def test_a_long_chain_keeps_no_more_factors_than_a_matrix_has(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROUNDS", 14)  # 28 components of a matrix of 9 rows
    run = trained("mlp", "fed_rac_lora", tmp_path / "run")
    record = run.export(tmp_path / "adapter")
    assert record["layers"]["2"]["rank"] == 9
    assert distance(loaded(run, tmp_path / "adapter"), run.weights()) < 1e-6


@pytest.mark.parametrize("dora", [False, True])
def test_a_run_in_memory_is_exported_by_the_difference_of_its_weights(dora, tmp_path):
    run = trained("mlp", "fedavg_lora", dora=dora)
    record = run.export(tmp_path / "adapter")
    assert distance(loaded(run, tmp_path / "adapter"), run.weights()) < 1e-6
    assert dora or record["layers"]["0"]["rank"] == RANK
    with pytest.raises(ConfigError, match="run in memory"):
        run.export(tmp_path / "first", round=1)


def test_the_lines_of_the_card_load_an_adapter_whose_folder_was_moved(tmp_path):
    run = trained("bert", "fedavg_lora", tmp_path / "run", head="full")
    record = run.export(tmp_path / "adapter")
    assert record["base"] == "./base"
    moved = shutil.move(tmp_path / "adapter", tmp_path / "elsewhere")
    assert distance(followed(moved)["model"], run.weights()) < 1e-6
    card = (moved / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "write the new path of `base` there as `base_model_name_or_path`" in card
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(moved / "base")})
    )
    found = AutoPeftModelForSequenceClassification.from_pretrained(moved).merge_and_unload()
    assert distance(found, run.weights()) < 1e-6


def table(rows: int, seed: int) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    age, dose = draw.normal(50, 12, rows), draw.normal(3e-3, 2e-3, rows)
    kind = np.where(age + 1e4 * dose > 80, "ill", np.where(age < 40, "none", "well"))
    return pd.DataFrame({"age": age, "flat": 7, "dose": dose, "kind": kind, "next": 2 * age + 5})


TABLES = {
    "classes": ("kind", [], {"form": "peft", "classes": ["ill", "none", "well"]}),
    "some classes": ("kind", ["data.labels=[2,0]"], {"form": "peft", "classes": ["well", "ill"]}),
    "as they are": ("kind", ["data.standardize=false"], {"form": "peft", "divide_by": None}),
    "a number": ("next", ["data.task=regression"], {"form": "state_dict", "classes": None}),
}


@pytest.mark.parametrize("case", TABLES)
def test_the_card_brings_raw_rows_of_a_table_to_the_model_and_names_its_answers(case, tmp_path):
    label, words, wanted = TABLES[case]
    form = wanted.pop("form")
    rows = table(40, 1)
    table(120, 0).to_csv(tmp_path / "train.csv", index=False)
    rows.to_csv(tmp_path / "test.csv", index=False)
    run = fedraclora.simulate(
        *(
            QUIET,
            "data=table",
            f"data.file={tmp_path}/train.csv",
            f"data.test_file={tmp_path}/test.csv",
        ),
        *(f"data.label={label}", "data.features=[dose,flat,age]", "pretrain=none", *words),
        *("model=mlp", "model.hidden=[8]", "local.lr=0.1", "local.epochs=3"),
        method={"name": "fed_rac_lora", "rank": 2},
        clients=4,
        clients_per_round=4,
        rounds=3,
    )
    run.export(tmp_path / "out", form)
    samples = json.loads((tmp_path / "out" / "export.json").read_text())["samples"]
    assert samples["features"] == ["dose", "flat", "age"]
    assert {key: samples.get(key) for key in wanted} == wanted
    if "classes" in samples:
        rows = rows[rows.kind.isin(samples["classes"])]
    assert 'frame[samples["features"]].to_numpy()' in (tmp_path / "out/README.md").read_text()
    raw = rows[samples["features"]].to_numpy()
    gone = np.vstack([raw, [np.nan, *raw[0][1:]]])
    answer = [*followed(tmp_path / "out", raw=gone)["answer"]]
    assert answer[-1] is None or np.isnan(float(answer[-1]))
    assert not any(given is None for given in answer[:-1])
    found = followed(tmp_path / "out", raw=raw)  # it builds the model, too
    expected = forward(run.model(), run.builder.built.task.test.inputs)
    assert torch.allclose(found["output"], expected, atol=1e-4)
    if label == "kind":
        right = np.mean(np.array(found["answer"]) == rows.kind)
        assert right == pytest.approx(run.summary["metrics"]["accuracy"])
    else:
        assert float(found["answer"].std()) > 1  # on the scale of the rows, whose deviation is 24
    given = run.evaluate(rows, target=label)
    assert given == pytest.approx(run.summary["metrics"], abs=1e-4)


@pytest.mark.parametrize("model", ["model=linear", "model=cnn", "model=mlp"])
def test_the_card_builds_a_model_of_ours(model, tmp_path):
    words = ("data=digits", "data.labels=[7,1,4]", "pretrain=none", model, "local.lr=0.1")
    method = {"name": "fed_rac_lora", "rank": 2}
    run = fedraclora.simulate(
        QUIET, *words, method=method, clients=4, clients_per_round=4, rounds=1
    )
    run.export(tmp_path / "out", "state_dict")
    found = followed(tmp_path / "out", raw=torch.zeros(2, 64))
    assert distance(found["model"], run.weights()) == 0
    assert set(found["answer"]) <= {7, 1, 4}


def test_the_classes_of_texts_are_named_in_the_config_of_their_model(tmp_path):
    datasets = pytest.importorskip("datasets")
    inputs, target = texts(40)
    columns = {n: t.tolist() for n, t in inputs.items()} | {"label": target.tolist()}
    named = datasets.Dataset.from_dict(columns).cast_column(
        "label", datasets.ClassLabel(names=["bad", "good"])
    )
    run = fedraclora.simulate(
        QUIET,
        model=MODELS["bert"][0](),
        data=[named.select(range(20)), named.select(range(20, 40))],
        test=texts(9, 4),
        method={"name": "fedavg_lora", "rank": 1},
        rounds=1,
    )
    for form, place in {"hf": "config.json", "peft": "base/config.json"}.items():
        run.export(tmp_path / form, form)
        config = json.loads((tmp_path / form / place).read_text())
        assert config["id2label"] == {"0": "bad", "1": "good"}
        assert config["label2id"] == {"bad": 0, "good": 1}
        assert "- output k is the k-th of `classes`" in (tmp_path / form / "README.md").read_text()
        facts = json.loads((tmp_path / form / "export.json").read_text())
        assert facts["samples"]["classes"] == ["bad", "good"]


@pytest.mark.slow
def test_the_card_of_a_model_from_elsewhere_names_its_classes(tmp_path):
    run = trained("bert", "fedavg_lora", tmp_path / "run", head="full")
    run.export(tmp_path / "bert", "hf")
    inputs, target = texts(20)
    names = {"reading": {"classes": ["bad", "good"]}}
    run = fedraclora.simulate(
        *(QUIET, "model=hf", f"model.path={tmp_path}/bert"),
        data=[({n: t[k::2] for n, t in inputs.items()}, target[k::2]) for k in range(2)],
        test=texts(9, 4),
        method={"name": "fedavg_lora", "rank": 1},
        rounds=1,
        head="full",
    )
    built = run.builder.built
    task = replace(built.task, **names)
    run.builder.__dict__["built"] = replace(built, task=task)  # a cached property
    run.export(tmp_path / "adapter")
    assert followed(tmp_path / "adapter")["model"].config.id2label == {0: "bad", 1: "good"}


def test_a_hugging_face_folder_is_the_trained_model(tmp_path):
    run = trained("bert", "fedavg_lora", tmp_path / "run")
    run.export(tmp_path / "hf", "hf")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    assert distance(model, run.weights()) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: transformers" in front
    for word in ("fedavg_lora", run.summary["weights_digest"], "torch=", "accuracy"):
        assert word in card
    facts = json.loads((tmp_path / "hf" / "export.json").read_text())
    assert facts["metrics"] == run.summary["metrics"]


def test_a_state_dict_is_the_trained_model_with_its_buffers(tmp_path):
    run = trained("mlp", "fed_rac_lora", tmp_path / "run")
    run.export(tmp_path / "plain", "state_dict")
    model = mlp()
    model.load_state_dict(load_file(tmp_path / "plain" / "model.safetensors"))
    assert distance(model, run.weights()) == 0


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
    )
    with seeded(0, "model"):
        return transformers.LlamaForCausalLM(config)


MODELS["llama"] = (llama, next_tokens)


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory):
    """A run that is exported by many, and read only."""
    return trained("llama", "fed_rac_lora", tmp_path_factory.mktemp("llama") / "run", head="frozen")


@pytest.fixture(scope="module")
def llama_export(llama_run, tmp_path_factory):
    """Give the folder of its export in a form, which is written once."""

    @cache
    def give(form):
        llama_run.export(place := tmp_path_factory.mktemp("export") / form, form)
        return place

    return give


def test_gguf_of_llama_form_is_the_trained_model(llama_run, llama_export):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        llama_export("gguf"), gguf_file="model.gguf", dtype=torch.float32
    )
    assert distance(model, llama_run.weights()) == 0


def test_a_gguf_file_is_where_a_run_begins(llama_run, llama_export, tmp_path):
    (inputs, target), test = texts(40), texts(20, 9)
    fit = {"input_ids": inputs["input_ids"] % 20, "attention_mask": inputs["attention_mask"]}
    run = fedraclora.simulate(
        QUIET,
        "target_modules=[q_proj]",
        model={"name": "hf", "path": str(llama_export("gguf") / "model.gguf")},
        data=[({n: t[k::2] for n, t in fit.items()}, target[k::2]) for k in range(2)],
        test=({n: t % 20 for n, t in test[0].items()}, test[1]),
        method={"name": "fed_rac_lora", "rank": 1},
        head="full",
        rounds=0,
    )
    assert run.summary["task"]["weights"] == "F32 in model.gguf, de-quantized to float32"
    found, wanted = run.weights(), llama_run.weights()
    shared = [n for n in wanted if n.startswith("model.")]
    assert len(shared) > 10
    assert all(torch.equal(found[n], wanted[n]) for n in shared)
    run.export(tmp_path / "hf", "hf")


def contents(place: Path) -> dict[str, tuple[int, bytes]]:
    """Give mode and bytes of every file of an export, without the folder that is in them."""
    return {
        str(path.relative_to(place)): (
            path.stat().st_mode & 0o777,
            path.read_bytes().replace(str(place).encode(), b""),
        )
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("form", ["peft", "hf", "state_dict", "gguf"])
def test_the_same_export_has_the_same_bytes_and_modes_and_no_path(
    form, llama_run, llama_export, tmp_path
):
    llama_run.export(tmp_path / "two", form)
    one, two = contents(llama_export(form)), contents(tmp_path / "two")
    assert one == two
    assert len({mode for mode, _ in one.values()}) == 1
    assert [n for n, (_, data) in one.items() if b".partial" in data] == []
    if form == "gguf":
        header = read_gguf_header(tmp_path / "two" / "model.gguf", "file")
        assert "/" not in str(header.fields["general.name"])
    if form == "peft":
        named = json.loads((tmp_path / "two" / "adapter_config.json").read_text())["target_modules"]
        assert named == sorted(named)


@pytest.mark.parametrize("form", ["peft", "hf", "gguf"])
def test_an_export_draws_no_bar_of_a_library(form, llama_run, tmp_path, capfd):
    transformers.utils.logging.enable_progress_bar()
    llama_run.export(tmp_path / form, form)
    told = capfd.readouterr()
    assert told.out + told.err == ""


@pytest.mark.parametrize("form", ["peft", "hf", "gguf"])
def test_an_export_that_is_not_read_back_is_the_same(
    form, llama_run, llama_export, tmp_path, monkeypatch
):
    read = contents(llama_export(form))
    for module in (whole_weights, peft_adapter):
        monkeypatch.setattr(module, "_hold", None)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", None)
    record = llama_run.export(tmp_path / "unread", form, check=False)
    assert record["read_back"] is False
    assert "largest_difference" not in str(record)
    apart = {"README.md", "export.json"}
    unread = contents(tmp_path / "unread")
    assert {n: f for n, f in read.items() if n not in apart} == {
        n: f for n, f in unread.items() if n not in apart
    }


def test_a_kill_leaves_no_folder_that_the_same_export_then_refuses(tmp_path, monkeypatch):
    run = trained("mlp", "fed_rac_lora")
    seen = []

    def killed(model, order):
        seen.append((tmp_path / "out").exists())
        (order.folder / "half").write_text("")
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nobody tidies up
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(FORMATS, "state_dict", killed)
        with pytest.raises(KeyboardInterrupt):
            run.export(tmp_path / "out", "state_dict")
    monkeypatch.undo()
    assert seen == [False]
    assert not (tmp_path / "out").exists()
    run.export(tmp_path / "out", "state_dict")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "half").exists()


def test_tied_weights_come_back_tied(llama_run, llama_export):
    assert distance(loaded(llama_run, llama_export("peft")), llama_run.weights()) < 1e-6
    model = transformers.AutoModelForCausalLM.from_pretrained(llama_export("hf"))
    assert distance(model, llama_run.weights()) == 0


REFUSED = {
    "no Hugging Face model": ("mlp", {}, {"format": "hf"}, "is no model of transformers"),
    "another form": ("gpt", {}, {"format": "gguf"}, "convert_hf_to_gguf.py"),
    "an unknown format": ("mlp", {}, {"format": "onnx"}, "'onnx'"),
    "a rank of whole weights": ("mlp", {}, {"format": "state_dict", "rank": 3}, "--rank 3"),
    "a rank of nothing": ("mlp", {}, {"rank": 0}, "rank=0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_leaves_nothing(case, tmp_path):
    model, keys, asked, message = REFUSED[case]
    run = trained(model, "fed_rac_lora", **keys)
    with pytest.raises(ConfigError, match=re.escape(message)):
        run.export(tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_factor_that_stays_with_clients_is_refused_and_a_local_head_is_said(tmp_path):
    with pytest.raises(ConfigError, match="FedSaLora keep a factor"):
        trained("mlp", "fedsa_lora").export(tmp_path / "fedsa")
    run = trained("mlp", "fed_rac_lora", head="personal")
    record = run.export(tmp_path / "local")
    assert "4.weight" in record["warnings"][0]
    assert "Each client kept 4.weight" in (tmp_path / "local" / "README.md").read_text()


def test_layers_that_peft_cannot_adapt_are_named(tmp_path):
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, groups=2)
            self.out = nn.Linear(4 * 1 * 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(
                self.conv(x.reshape(-1, 2, 2, 3).repeat(1, 1, 2, 2)[..., :4]).flatten(1)
            )

    x, y = numbers(40)
    keys = {"data": [(x[:20], y[:20]), (x[20:], y[20:])], "test": numbers(9, 4), "rounds": 1}
    run = fedraclora.simulate(
        QUIET,
        "target_modules=all",
        model=Grouped(),
        method={"name": "fedavg_lora", "rank": 1},
        **keys,
    )
    with pytest.raises(ModelError, match=r"'conv' is .*in groups"):
        run.export(tmp_path / "grouped")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A run whose config is all that it takes."""
    return fedraclora.simulate(
        *(QUIET, "output.plots=false"),
        *("data=virtual", "data.held_out=50", "data.samples=20", "model.hidden=[9]"),
        method={"name": "fed_rac_lora", "rank": RANK},
        clients=5,
        clients_per_round=5,
        rounds=2,
        head="full",
        folder=tmp_path_factory.mktemp("plain") / "run",
    )


def test_the_command_prints_errors_by_layer_and_writes_beside_the_run(plain_run, capsys):
    words = [str(plain_run.folder), "--rank", "2"]
    assert cli.run("export", words) == 0
    out = plain_run.folder / "export" / "peft"
    assert "relative error" in (said := capsys.readouterr().out)
    assert re.search(r"\b2\s+4\s+\d\.\d\de", said)
    assert (out / "adapter_model.safetensors").is_file()
    assert cli.run("export", words) == 1
    assert "is not empty" in capsys.readouterr().err


def test_the_command_says_what_it_cannot_export(plain_run, tmp_path, capsys):
    stopped = tmp_path / "stopped"
    shutil.copytree(plain_run.folder, stopped, ignore=shutil.ignore_patterns("export"))
    (stopped / "summary.json").unlink()
    (tmp_path / "empty").mkdir()
    for name, words in {
        "stopped": "this run is not finished; resume it first with resume=",
        "empty": "is not a run folder: it has no config.yaml",
        "missing": "is not a run folder",
    }.items():
        assert cli.run("export", [str(tmp_path / name)]) == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / name / "export").exists()


def test_a_run_that_was_stopped_gives_the_rounds_that_it_has(plain_run, tmp_path):
    stopped, out = tmp_path / "stopped", tmp_path / "out"
    shutil.copytree(plain_run.folder, stopped, ignore=shutil.ignore_patterns("export"))
    (stopped / "summary.json").unlink()
    shutil.rmtree(stopped / "checkpoint")
    words = ["--round", "1", "--format", "state_dict", "--out", str(out)]
    assert cli.run("export", [str(stopped), *words]) == 0
    found, wanted = load_file(out / "model.safetensors"), load_weights(plain_run.folder, 1)
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    facts = json.loads((out / "export.json").read_text())
    assert (facts["rounds"], facts["cohort"]) == (1, plain_run.summary["cohort"])


def test_the_card_says_how_to_run_it_again(plain_run, tmp_path, monkeypatch):
    plain_run.export(tmp_path / "out", "state_dict")
    monkeypatch.chdir(tmp_path / "out")
    lines = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[-1]
    names: dict[str, object] = {}
    exec(lines, names)
    again = names["run"]
    assert again.summary["weights_digest"] == plain_run.summary["weights_digest"]


def test_a_damaged_link_is_named(plain_run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(plain_run.folder, copied)
    link = copied / "chain" / "000001.safetensors"
    link.write_bytes(link.read_bytes()[:-5] + b"xxxxx")
    run = finished(from_plain(read_config(copied), METHODS, resuming=True), copied)
    with pytest.raises(CheckpointError, match=r"000001\.safetensors is damaged"):
        run.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    """The run of a model of the program knows none; one of numbers needs none."""
    run = trained("bert", "fedavg_lora", tmp_path / "run")
    record = run.export(tmp_path / "hf", "hf")
    assert not (tmp_path / "hf" / "tokenizer_config.json").exists()
    assert any("no tokenizer" in told for told in record["warnings"])
    assert "no tokenizer" in (tmp_path / "hf" / "README.md").read_text()
    facts = json.loads((tmp_path / "hf" / "export.json").read_text())
    assert facts["warnings"] == record["warnings"]
    plain = trained("mlp", "fedavg_lora", tmp_path / "numbers")
    assert plain.export(tmp_path / "plain", "state_dict")["warnings"] == []


def test_the_card_of_one_score_says_what_its_one_output_is(tmp_path):
    x = torch.linspace(-1, 1, 48).reshape(24, 2)
    data = [(part, (part[:, 0] > 0).long()) for part in x.split(8)]
    words = ("output.progress=false", "model.hidden=[5]")
    run = fedraclora.simulate(*words, model="mlp", data=data, loss="logistic", rounds=1)
    run.export(tmp_path / "peft")
    card = (tmp_path / "peft" / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if "MODELS[" in line]
    assert "classes=1" in line
    assert "two classes" in line.partition("#")[2]
