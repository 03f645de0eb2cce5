"""Answers by likelihood: scores beside a plain loop, what is read of choices, and whole runs."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from chats import TEMPLATE, WORDS, write_rows

import fedraclora
from fedraclora.data import token_losses
from fedraclora.data.clients import PartitionedData
from fedraclora.data.sources.instructions import load_instructions
from fedraclora.data.task import Task
from fedraclora.errors import ConfigError, DataError
from fedraclora.evaluation.choices import Questions, measure_of
from fedraclora.models.hf import build_causal_lm

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
# Of one token; with a part in common; one that begins another.
LISTS = (
    ["red", "blue"],
    ["round", "blue round", "blue square", "green ball"],
    ["red", "red ball box"],
)
ROWS = [
    {"prompt": " ".join(["what", *WORDS[k : k + 1 + k % 4]]), "response": own[k % len(own)],
     "options": own, "who": f"person {k % 3}"}
    for k, own in enumerate(LISTS * 8)
]  # fmt: skip


def asking(tmp_path: Path, tokenizer: str, *, config: Any = LLAMA, **given: Any) -> Task:
    """A task of all rows, each of which is a question, with a model of random weights."""
    file = write_rows(tmp_path / "rows.jsonl", given.pop("rows", ROWS))
    more = {"choices": "options", **given}
    data = load_instructions(file=str(file), test_file=str(file), tokenizer=tokenizer, **more)
    model = build_causal_lm(shape=(), classes=data.classes, seed=3, config=config).model
    parts = PartitionedData(data.train, torch.arange(1), torch.tensor([0, 1]))
    named = {"loss": data.loss, "metrics": data.metrics, "tokenizer": data.tokenizer}
    return Task(model, ("lm_head",), train=parts, test=data.test, choices=len(data.test), **named)


def one_by_one(task: Task, weights: dict[str, torch.Tensor]) -> list[list[float]]:
    """Score every answer of every row by a pass of its own, as it is written."""
    found = []
    for row in ROWS:
        prompt = task.tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        before, sums = task.tokenizer(prompt)["input_ids"], []
        for text in row["options"]:
            spoken = task.tokenizer(f" {text}")["input_ids"]
            ids = torch.tensor([before + spoken])
            with torch.no_grad():
                logits = torch.func.functional_call(task.model.eval(), weights, (ids,)).logits
            logs = logits[0, len(before) - 1 : -1].log_softmax(dim=1)
            sums.append(sum(float(logs[k, token]) for k, token in enumerate(spoken)))
        found.append(sums)
    return found


@pytest.mark.parametrize(
    ("config", "few"), [(LLAMA, 1), (GPT2, 1024)], ids=["llama, at labels", "gpt2, everywhere"]
)
def test_scores_are_those_of_each_answer_alone(
    config: Any, few: int, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_losses, "MANY_OUTPUTS", few)
    monkeypatch.setattr(token_losses, "PIECE", 200)  # outputs of two tokens at a time
    task = asking(tmp_path, tokenizer, config=config)
    weights = {name: 4 * each.detach() for name, each in task.model.named_parameters()}
    wanted = one_by_one(task, weights)
    scores = Questions.of(task, task.test).scores(task.model, weights, 5).tolist()
    for own, alone in zip(scores, wanted, strict=True):
        assert own[: len(alone)] == pytest.approx(alone, abs=1e-4)
        assert own[len(alone) :] == [-float("inf")] * (4 - len(alone))
    found = measure_of(task, task.test, 5)(weights)
    sums = [max(range(len(own)), key=own.__getitem__) for own in wanted]
    norms = [max(range(len(own)), key=lambda k, own=own, row=row: own[k] / len(row["options"][k]))
             for own, row in zip(wanted, ROWS, strict=True)]  # fmt: skip
    assert sums != norms
    for best, name in ((sums, "choice_accuracy"), (norms, "choice_accuracy_norm")):
        right = [row["options"][k] == row["response"] for row, k in zip(ROWS, best, strict=True)]
        assert found[name] == pytest.approx(sum(right) / len(right))
        assert 0 < sum(right) < len(right)


def test_answers_of_one_token_cost_a_pass_over_the_prompts(tmp_path: Path, tokenizer: str) -> None:
    task = asking(tmp_path, tokenizer)
    asked = Questions.of(task, task.test)
    rows = asked.owner.bincount().tolist()
    assert rows == [1, 2, 1] * 8  # of 2, 4 and 2 answers: a prefix of another has no row of its own
    spread = Questions.of(replace(task, choices=6), task.test)
    assert torch.equal(spread.right, task.test.beside["right"][::4])


@pytest.mark.parametrize("kind", ["list", "json", "answers", "closed"])
def test_choices_are_a_column_or_the_answers_of_the_task(
    kind: str, tmp_path: Path, tokenizer: str
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "what", "response": "red", "options": ["red", "blue", "red"]},
        {"prompt": "what", "response": "blue", "options": ["red", "blue"]},
    ]
    given: dict[str, Any] = {"choices": "options"}
    if kind == "json":
        rows = [{**row, "options": json.dumps(row["options"])} for row in rows]
    if kind == "closed":
        given = {"choices": ["red", " blue "]}
    if kind == "answers":
        given = {"choices": None, "prompt": "prompt", "response": "response",
                 "answers": {"red": "red", "blue": "blue"}}  # fmt: skip
    task = asking(tmp_path, tokenizer, rows=rows, **given)
    asked = Questions.of(task, task.test)
    assert asked.right.tolist() == [[True, False], [False, True]]
    assert asked.characters.tolist() == [[3, 4]] * 2
    assert asked.answers == ("red", "blue")


@pytest.mark.parametrize(
    ("change", "given", "said"),
    [
        ({"options": ["blue", "green"]}, {}, r"row 2.*'red'.*choices"),
        ({"options": "red"}, {}, r"row 2.*data\.choices.*'red'.*a list"),
        ({"options": 3}, {}, r"row 2.*data\.choices.*'3'.*a list"),
        ({}, {"choices": "option"}, r"data\.choices.*unknown column 'option'.*options"),
        ({"options": ["red"]}, {}, "'red'.*two or more"),
        ({"options": ["red", "who", "whom"]}, {}, "'red', '<unk>', '<unk>'.*differ"),
        ({"options": ["red", ""]}, {}, "choices 'red', '', as .*none of them empty"),
        ({}, {"choices": None}, r"evaluate\.choices=2 wants questions .*data\.choices"),
        ({}, {"template": TEMPLATE.replace("m['content']", "m['content'][::-1]")}, "as it is"),
        ({"options": ["red", "red " * 9]}, {}, "12 tokens.*9 at most"),
    ],
)
def test_choices_that_cannot_be_known_are_refused(
    change: dict[str, Any], given: dict[str, Any], said: str, tmp_path: Path, tokenizer: str
) -> None:
    row = {"prompt": "what", "response": "red", "options": ["red", "blue"]}
    more = {"rows": [row, {**row, **change}], "config": {**GPT2, "n_positions": 9}, **given}

    def ask() -> None:
        task = asking(tmp_path, tokenizer, **more)
        Questions.of(task, task.test)

    with pytest.raises((ConfigError, DataError), match=said):
        ask()


def run(questions: Path, tokenizer: str, *words: str, **keys: Any) -> fedraclora.RunResult:
    given = ("experiment=tiny_instructions", f"data.file={questions}", "data.client=who")
    more = ("evaluate.generate=null", f"data.tokenizer={tokenizer}", "rounds=2")
    return fedraclora.simulate(*given, *more, *words, **keys)


@pytest.mark.slow
def test_a_run_answers_by_likelihood_from_its_start_to_its_folder(
    tmp_path: Path, tokenizer: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    words = ("data.choices=options", "evaluate.choices=5", "evaluate.every=1")
    stop = ("data.validation=0.3", "stop.patience=9", "stop.metric=choice_accuracy")
    whole = run(file, tokenizer, *words, *stop, folder=tmp_path / "run")
    names = ["perplexity", "token_accuracy", "loss", "choice_accuracy", "choice_accuracy_norm"]
    assert [list(row["metrics"]) for row in whole.rows] == [names] * 3
    read = fedraclora.read_run(tmp_path / "run")
    assert read.evaluate() == whole.summary["metrics"]
    assert list(read.evaluate(str(file))) == names
    assert read.predict(ROWS[:2])["prediction"].notna().all()  # no choices are needed
    with pytest.raises(ConfigError, match=r"evaluate\.choices=5 wants questions"):
        run(file, tokenizer, "evaluate.choices=5")
    with pytest.raises(ConfigError, match=r"data\.choices.*evaluate\.choices"):
        run(file, tokenizer, "data.choices=options")


def test_questions_of_a_run_are_a_task_of_the_harness(tmp_path: Path, tokenizer: str) -> None:
    """Each prompt and each answer is read as the run has read it."""
    root = Path(__file__).resolve().parents[2]
    task = asking(tmp_path, tokenizer)
    run_of = SimpleNamespace(builder=SimpleNamespace(built=SimpleNamespace(task=task)))
    runpy.run_path(str(root / "docs" / "examples" / "harness.py"))["write"](run_of, tmp_path / "t")
    lines = (tmp_path / "t" / "questions.jsonl").read_text().splitlines()
    for line, row in zip(map(json.loads, lines), ROWS, strict=True):
        assert line["prompt"] == f"user {row['prompt']} assistant"
        assert line["choices"] == row["options"]
        assert line["choices"][line["right"]] == row["response"]
    written = yaml.safe_load((tmp_path / "t" / "questions.yaml").read_text())
    file = written["dataset_kwargs"]["data_files"]["test"]
    assert Path(file) == tmp_path / "t" / "questions.jsonl"
    parts = [written[f"doc_to_{part}"] for part in ("text", "choice", "target")]
    assert parts == ["{{prompt}}", "{{choices}}", "{{right}}"]
    assert written["target_delimiter"] == " "
