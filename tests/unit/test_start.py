"""Beginnings: a finished run, or a PEFT adapter; what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import fedraclora
from fedraclora.errors import CheckpointError, ConfigError, DataError, ModelError
from fedraclora.models.adapter import merge_adapter
from fedraclora.models.built import seeded
from tests.common import FIXED
from tests.unit.test_export import loaded, numbers, trained

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


def net(*, wide: int = 16) -> nn.Module:
    with seeded(0, "model"):
        return nn.Sequential(
            nn.Linear(12, wide), nn.ReLU(), nn.Linear(wide, 9), nn.LayerNorm(9), nn.Linear(9, 2)
        )


def run(start: Path | None, folder: Path | None = None, *, rounds: int = 0, **keys: Any):
    x, y = numbers(80)
    given = {"model": net(), "method": {"name": "fed_rac_lora", "rank": 2}} | keys
    return fedraclora.simulate(
        *("output.progress=false", *FIXED, *(["output.plots=false"] if folder else [])),
        data=[(x[k::4], y[k::4]) for k in range(4)],
        test=numbers(30, 9),
        rounds=rounds,
        folder=folder,
        init_from=None if start is None else str(start),
        **given,
    )


@pytest.mark.parametrize("method", ["fed_rac_lora", "fedavg_lora"])
def test_a_finished_run_is_where_another_begins(method, tmp_path):
    first = trained("mlp", method, tmp_path / "first")
    second = run(tmp_path / "first", tmp_path / "second")
    assert second.summary["weights_digest"] == first.summary["weights_digest"]
    assert second.rows[0]["metrics"] == first.rows[-1]["metrics"]
    stored = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())["init_from"]
    assert stored["sha256"] == first.summary["weights_digest"]
    assert second.summary["task"]["start"]["run"] == str(tmp_path / "first")


def plain_run(folder: Path | None, start: Path | None = None, **keys: Any):
    """Run by choices alone, so that its config is all that it takes."""
    return fedraclora.simulate(
        *("output.progress=false", "data=virtual", "data.held_out=50", "data.samples=20"),
        *FIXED,
        *(["output.plots=false"] if folder else []),
        **{
            "model": {"name": "mlp", "hidden": [9]},
            "clients": 5,
            "clients_per_round": 5,
            "rounds": 2,
        }
        | {"folder": folder, "init_from": None if start is None else str(start)}
        | keys,
    )


@pytest.mark.slow
def test_a_run_that_began_elsewhere_goes_on_without_that_folder_and_bit_for_bit(tmp_path):
    plain_run(tmp_path / "first")
    whole = plain_run(tmp_path / "whole", tmp_path / "first", rounds=4)
    plain_run(tmp_path / "halves", tmp_path / "first", rounds=2)
    shutil.move(tmp_path / "first", tmp_path / "gone")
    stored = yaml.safe_load((tmp_path / "halves" / "config.yaml").read_text())
    halves = fedraclora.simulate(stored | {"rounds": 4}, folder=tmp_path / "halves", resume=True)
    assert halves.summary["weights_digest"] == whole.summary["weights_digest"]
    assert stored["init_from"]["path"] == str(tmp_path / "first")


@pytest.mark.slow
def test_a_beginning_that_has_changed_since_is_refused(tmp_path):
    plain_run(tmp_path / "first")
    config = plain_run(None, tmp_path / "first").config
    shutil.rmtree(tmp_path / "first")
    plain_run(tmp_path / "first", seed=1)
    with pytest.raises(CheckpointError, match="has changed"):
        fedraclora.simulate(config)


def test_what_an_export_writes_is_where_a_run_begins(tmp_path):
    first = trained("mlp", "fedavg_lora", tmp_path / "first", dora=True)
    first.export(tmp_path / "adapter")
    second = run(tmp_path / "adapter")
    apart = [(second.weights()[n] - w).abs().max() for n, w in first.weights().items()]
    assert max(apart) < 1e-6
    assert second.summary["task"]["start"]["adapter"] == str(tmp_path / "adapter")


def test_an_adapter_that_peft_trained_is_merged(tmp_path):
    model = net()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], modules_to_save=["4"])
    adapted = get_peft_model(net(), config)
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if "lora_" in n or "modules_to_save" in n:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    adapted.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    begun = run(tmp_path / "adapter").weights()
    A, B = (stored[f"base_model.model.0.lora_{k}.weight"] for k in "AB")
    assert torch.allclose(begun["0.weight"], model[0].weight.detach() + 2 * (B @ A), atol=1e-6)
    assert torch.equal(begun["4.weight"], stored["base_model.model.4.weight"])
    assert torch.equal(begun["3.weight"], model[3].weight.detach())


def test_the_adapter_of_a_run_that_began_from_an_adapter_is_of_that_beginning(tmp_path):
    trained("mlp", "fedavg_lora", tmp_path / "first").export(tmp_path / "adapter")
    second = run(tmp_path / "adapter", tmp_path / "second", rounds=2)
    record = second.export(tmp_path / "more")
    assert {layer["rank"] for layer in record["layers"].values()} == {4, 2}
    merged = dict(loaded(second, tmp_path / "more").named_parameters())
    assert (
        max(float((merged[n] - w).detach().abs().max()) for n, w in second.weights().items()) < 1e-6
    )


@pytest.fixture
def adapter(tmp_path) -> Path:
    trained("mlp", "fedavg_lora").export(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_corrupt_adapter_is_refused_by_name(adapter):
    path = adapter / "adapter_model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"adapter_model\.safetensors is damaged"):
        run(adapter)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * torch.nan}, path)
    with pytest.raises(DataError, match="are not finite"):
        run(adapter)
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(ModelError, match=f"the adapter lacks {name}"):
        run(adapter)
    save_file(tensors | {"base_model.model.7.lora_A.weight": tensors[name].clone()}, path)
    with pytest.raises(ModelError, match=r"model has not, base_model\.model\.7"):
        run(adapter)
    path.unlink()
    with pytest.raises(DataError, match=r"there is no adapter_model\.safetensors"):
        run(adapter)
    path.write_bytes(whole)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(DataError, match=r"adapter_config\.json is damaged"):
        run(adapter)


def test_an_adapter_of_another_model_rank_or_kind_is_refused_by_name(adapter, tmp_path):
    with pytest.raises(ModelError, match=r"size mismatch for .*0\.lora_"):
        run(adapter, model=net(wide=20))
    with pytest.raises(ModelError, match=r"no layer of .*ModuleDict"):
        merge_adapter(nn.ModuleDict({"a": nn.Linear(12, 16)}), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(ModelError, match="size mismatch"):
        run(adapter)


ODD = {"use_rslora": "text", "r": 10**9, "lora_alpha": None, "alpha_pattern": {"7": 2}, "slip": 1}


@pytest.mark.parametrize("key", ODD)
def test_a_configuration_of_another_type_is_refused_by_its_key(key, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {key: ODD[key]}))
    with pytest.raises((DataError, ModelError), match="7" if key == "alpha_pattern" else key):
        run(adapter)


def test_factors_of_whole_numbers_are_refused(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_A" in n)
    save_file({**tensors, name: tensors[name].round().int()}, adapter / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"lora_A.* holds torch\.int32"):
        run(adapter)


def test_files_of_a_run_that_changed_places_are_named(tmp_path):
    """A link is a whole file with a right digest; so is the checkpoint of another run."""
    first, other = tmp_path / "first", tmp_path / "other"
    trained("mlp", "fed_rac_lora", first)
    trained("mlp", "fed_rac_lora", other, seed=3)
    link, checkpoint = "chain/000002.safetensors", "checkpoint/checkpoint.safetensors"
    for name, path, source in (
        ("link", checkpoint, first / link),
        ("run", checkpoint, other / checkpoint),
        ("summary", "summary.json", first / "digests.json"),
    ):
        shutil.copytree(first, tmp_path / name)
        shutil.copyfile(source, tmp_path / name / path)
        with pytest.raises(CheckpointError, match=Path(path).name):
            run(tmp_path / name)


REFUSED = {
    "nothing": (lambda f: None, {}, ConfigError, "holds neither a run"),
    "unfinished": (lambda f: (f / "summary.json").unlink(), {}, CheckpointError, "is not finished"),
    "other shapes": (lambda f: None, {"model": net(wide=20)}, ModelError, "0.weight is (16, 12)"),
    "pretraining": (lambda f: None, {"pretrain": "digits_0_4"}, ConfigError, "pretrain=none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_cannot_be_begun_from_is_refused_by_name(case, tmp_path):
    change, keys, kind, words = REFUSED[case]
    if case != "nothing":
        trained("mlp", "fed_rac_lora", tmp_path / "first")
        change(tmp_path / "first")
    with pytest.raises(kind) as caught:
        run(tmp_path / "first", tmp_path / "second", **keys)
    assert words in str(caught.value)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("start", ["{name:[0]}", "{name:a}", "{path:a,rank:three}", "{path:[a]}"])
def test_a_beginning_that_is_no_folder_is_refused(start):
    with pytest.raises(ConfigError, match="init_from"):
        fedraclora.simulate("data=digits", "pretrain=none", "rounds=0", f"init_from={start}")
