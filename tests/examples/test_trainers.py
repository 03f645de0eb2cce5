"""The examples with trainers, in one module: TRL is imported in one process of the tests."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fedraclora
from fedraclora.client import Round, Trained
from fedraclora.errors import FedRacLoraError
from tests.language.chats import save_tokenizer, write_rows

ROOT = Path(__file__).resolve().parents[2]
RANK, ALPHA, STEPS, ROUNDS = 3, 4.0, 2, 2
SIZES = (7, 4)  # rows of each client
REFERENCE = {"transformers_trainer": (), "sft": (), "dpo": ("first",)}
COLOURS = {"ball": "red", "box": "blue"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the extra trainers"),
]


@functools.cache
def loaded(kind: str) -> ModuleType:
    """An example, as a module of a user."""
    spec = importlib.util.spec_from_file_location(kind, ROOT / "docs" / "examples" / f"{kind}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"RANK": RANK, "ALPHA": ALPHA, "STEPS": STEPS}.items():
        setattr(module, name, value)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny random models with a tokenizer, and rows of two clients, as files."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
    )

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": 18, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        bert = BertForSequenceClassification(BertConfig(**sizes))
        llama = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, eos_token_id=1))
    found = {}
    models = {"transformers_trainer": bert, "sft": llama, "dpo": llama}
    for kind, model in models.items():
        found[kind] = save_tokenizer(tmp_path_factory.mktemp(kind), None)
        model.save_pretrained(found[kind])
        write_rows(Path(found[kind]) / "rows.jsonl", rows_of(kind))
    return found


def rows_of(kind: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for client, size in enumerate(SIZES):
        for row in range(size):
            thing, colour = list(COLOURS.items())[(row + client) % 2]
            prompt = f"what colour is the {thing}"
            found.append(
                {"client": client}
                | {
                    "transformers_trainer": {"text": prompt, "label": (row + client) % 2},
                    "sft": {"prompt": prompt, "completion": f" {colour}"},
                    "dpo": {"prompt": prompt, "chosen": f" {colour}", "rejected": " green"},
                }[kind]
            )
    return found


def run(
    kind: str, folders: dict[str, str], *reference: str, **keys: object
) -> fedraclora.RunResult:
    return loaded(kind).main(  # type: ignore[no-any-return]
        folders[kind],
        f"{folders[kind]}/rows.jsonl",
        *(reference or REFERENCE[kind]),
        **{"rounds": ROUNDS, "engine": "inline", "local.lr": 1.0} | keys,
    )


def depth_of(model: Any) -> int:
    """How many calls lie between a model and its embedding."""
    found: list[int] = []
    embedding = model.get_input_embeddings()
    with embedding.register_forward_hook(lambda *_: found.append(calls())):
        model(input_ids=torch.ones(1, 2, dtype=torch.long))
    return found[0] - calls()


def calls() -> int:
    """How deep the stack is."""
    frame, depth = inspect.currentframe(), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


@pytest.mark.long
@pytest.mark.parametrize("kind", REFERENCE)
def test_rounds_repeat_and_a_model_does_not_grow(
    kind: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, seen = loaded(kind), []
    train = module.train

    def watched(round_: Round, **more: Any) -> Trained:
        done: Trained = train(round_, **more)
        model = module.load(folders[kind])[0]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        frozen = [p for n, p in model.named_parameters() if "lora_A" in n and ".default." in n]
        assert not any(p.requires_grad or p.grad is not None for p in frozen)
        seen.append(
            (done.steps, depth_of(model), hooks, sum(p.numel() for p in model.parameters()))
        )
        return done

    monkeypatch.setattr(module, "train", watched)
    first = run(kind, folders)
    assert [*seen] == [seen[0]] * (ROUNDS * len(SIZES))
    assert seen[0][0] == STEPS
    assert "forward" not in vars(module.load(folders[kind])[1])  # a reference, or the tokenizer
    monkeypatch.undo()
    other = run(kind, folders).weights()
    assert all(torch.equal(value, other[name]) for name, value in first.weights().items())
    assert all(math.isfinite(row["train_loss"]) for row in first.rows[1:])


def test_a_round_of_sft_is_the_trainer_on_peft_by_hand(
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    module, seen, frozen = loaded("sft"), {}, {}
    train = module.train

    def watched(round_: Round, **more: Any) -> Trained:
        done: Trained = train(round_, **more)
        for name, tensor in module.load(folders["sft"])[0].named_parameters():
            if "lora_A" in name:
                frozen[name] = tensor.detach().clone()
        seen[round_.client] = (round_.seed, round_.data, done)
        return done

    monkeypatch.setattr(module, "train", watched)
    weights = run("sft", folders, rounds=1).weights()
    assert "made for next_token" not in "".join(capfd.readouterr())  # nobody knows the loss
    trained = {}
    for client, (seed, data, done) in seen.items():
        plain = AutoModelForCausalLM.from_pretrained(folders["sft"])
        lora = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        model = get_peft_model(plain, lora)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.data.copy_(frozen[name])
                parameter.requires_grad_(False)
        options = SFTConfig(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            seed=seed,
            learning_rate=module.RATE,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
        )
        words = AutoTokenizer.from_pretrained(folders["sft"])
        SFTTrainer(model, options, train_dataset=data, processing_class=words).train()
        trained[client] = {
            n.removeprefix("base_model.model.").replace("lora_B.default.weight", "weight/B"): p
            for n, p in model.named_parameters()
            if "lora_B" in n
        }
        assert trained[client].keys() == done.tensors.keys()
        assert all(torch.equal(p, done.tensors[n]) for n, p in trained[client].items())
    shares = [size / sum(SIZES) for size in SIZES]
    before = AutoModelForCausalLM.from_pretrained(folders["sft"]).state_dict()
    for name, weight in weights.items():
        wanted = before[name]
        if f"{name}/B" in trained[0]:
            key = f"base_model.model.{name.removesuffix('weight')}lora_A.default.weight"
            mean = sum(p * trained[k][f"{name}/B"] for k, p in enumerate(shares))
            wanted = wanted + ALPHA / RANK * mean @ frozen[key]
            assert not torch.equal(wanted, before[name])
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-6)


@pytest.mark.short(when=lambda reference: reference == "round")
@pytest.mark.parametrize("reference", ["first", "round"])
def test_the_reference_of_dpo_is_the_one_that_was_chosen(
    reference: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is of a model that equals its reference: the loss is log 2."""
    monkeypatch.setattr(loaded("dpo"), "STEPS", 1)
    losses = [row["train_loss"] for row in run("dpo", folders, reference).rows[1:]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert (losses[1] == pytest.approx(math.log(2), abs=1e-5)) is (reference == "round")


@pytest.mark.long
@pytest.mark.parametrize("method", ["fed_rac_lora", "ffa_lora"])
def test_no_step_of_dpo_has_a_gradient_of_what_is_frozen(
    method: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is switched off and on for the reference, which thaws all of it in PEFT."""
    module, seen = loaded("dpo"), []

    class Watched(module.trl.DPOTrainer):  # type: ignore[name-defined,misc]
        def training_step(self, model: Any, *args: Any, **more: Any) -> Any:
            loss = super().training_step(model, *args, **more)
            seen.append([n for n, p in model.named_parameters() if p.grad is not None])
            return loss

    monkeypatch.setattr(module.trl, "DPOTrainer", Watched)
    run("dpo", folders, "round", method=method)
    assert len(seen) == ROUNDS * STEPS * len(SIZES)
    assert all(names and all("lora_B.default" in name for name in names) for names in seen)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_resumed_run_has_the_same_bits(
    kind: str, folders: dict[str, str], tmp_path: Path
) -> None:
    straight = run(kind, folders).weights()
    run(kind, folders, rounds=1, folder=tmp_path / "run")
    gone_on = run(kind, folders, folder=tmp_path / "run", resume=True).weights()
    assert all(torch.equal(value, gone_on[name]) for name, value in straight.items())


@pytest.mark.long
def test_a_loss_of_nan_fails_the_client_by_name(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded("sft"), "RATE", 1e38)
    with pytest.raises(FedRacLoraError, match=r"client 0.*(NaN|finite)"):
        run("sft", folders)
