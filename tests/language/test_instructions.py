"""Files of conversations become token ids with labels on the answers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chats import WORDS, write_rows

from fedraclora.data import make_partition
from fedraclora.data.encoders.chat import Chat
from fedraclora.data.encoders.conversations import Conversation, RowForm, read_conversations
from fedraclora.data.sources.glue_instructions import TASKS, load_glue_instructions
from fedraclora.data.sources.instructions import load_instructions
from fedraclora.errors import ConfigError, DataError

PAIR = {"prompt": "what colour is the ball", "response": "red"}
CHAT = {
    "messages": [
        {"role": "user", "content": "what colour is the ball"},
        {"role": "assistant", "content": "red"},
    ]
}
ALPACA = {"instruction": "what colour is", "input": "the ball", "output": "red"}
SHAREGPT = {
    "messages": [{"from": "human", "value": PAIR["prompt"]}, {"from": "gpt", "value": "red"}]
}


def load(file: Path, tokenizer: str, **change: Any):
    return load_instructions(
        **{"file": str(file), "tokenizer": tokenizer, "test_fraction": 0.5, **change}
    )


def words(ids: torch.Tensor) -> str:
    every = ["<pad>", "</s>", "<unk>", *WORDS]
    return " ".join(every[k] for k in ids.tolist() if k >= 0)


@pytest.mark.parametrize(
    "row", [PAIR, CHAT, ALPACA, SHAREGPT], ids=["pair", "chat", "alpaca", "gpt"]
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_every_form_and_file_gives_the_same_samples(
    row: dict[str, Any], kind: str, tmp_path: Path, tokenizer: str
) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_rows(path, [row] * 4)
    else:
        cells = row if kind == "parquet" or "messages" not in row else {
            "messages": json.dumps(row["messages"])
        }  # fmt: skip
        frame = pd.DataFrame([cells] * 4)
        frame.to_parquet(path) if kind == "parquet" else frame.to_csv(path, index=False)
    data = load(path, tokenizer)
    ids, labels = data.train.inputs["input_ids"], data.train.target
    assert ids.shape == labels.shape == data.train.inputs["attention_mask"].shape
    assert words(ids[0]) == "user what colour is the ball assistant red </s>"
    assert words(labels[0]) == "red </s>"  # the response and its end, and nothing else
    assert (len(data.train), len(data.test), data.classes) == (2, 2, len(WORDS) + 3)
    assert (data.loss, data.metrics) == ("next_token", ("perplexity", "token_accuracy", "loss"))


def test_every_answer_of_a_conversation_is_labelled(tmp_path: Path, tokenizer: str) -> None:
    turns = [("user", "what colour"), ("assistant", "red"), ("user", "what shape"),
             ("assistant", "round"), ("user", "the box")]  # fmt: skip
    row = {"messages": [{"role": role, "content": said} for role, said in turns]}
    data = load(write_rows(tmp_path / "rows.jsonl", [row] * 2), tokenizer)
    assert words(data.train.inputs["input_ids"][0]).endswith("assistant round </s>")  # cut after it
    assert words(data.train.target[0]) == "red </s> round </s>"


def test_columns_may_be_put_into_a_question(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "rows.tsv").write_text('x\t1\tthe "ball\nx\t0\tthe box\n')
    data = load(tmp_path / "rows.tsv", tokenizer, prompt="what is {2}", response="1", header=False,
                answers={0: "square", 1: "round"}, client=0)  # fmt: skip
    both = [words(t.target[0]) for t in (data.train, data.test)]
    assert sorted(both) == ["round </s>", "square </s>"]
    with pytest.raises(DataError, match=r"row 2: data\.answers .*'0'"):
        load(tmp_path / "rows.tsv", tokenizer, prompt="2", response="1", header=False,
             answers={1: "round"})  # fmt: skip


def test_clients_are_those_of_a_column(questions: Path, tokenizer: str) -> None:
    data = load(questions, tokenizer, client="who", test_fraction=0.25)
    parts, facts = make_partition(data, name="natural", clients=None, seed=0)
    assert [len(part) for part in parts] == [15, 15, 15]  # a fourth of each client's is held out
    assert set(data.columns) == {"who", "client"}
    shares, _ = make_partition(data, name="iid", clients=5, seed=0)
    assert len(shares) == 5
    assert facts["clients"] == 3


def test_what_is_too_long_is_cut_and_said(
    tmp_path: Path, tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    long = {**PAIR, "response": "red " * 9}
    file = write_rows(tmp_path / "rows.jsonl", [PAIR, long] * 4)
    data = load(file, tokenizer, max_length=10)
    assert data.train.inputs["input_ids"].shape[1] == data.test.inputs["input_ids"].shape[1] == 10
    assert (data.info["truncated"], data.info["cut_away"]) == (4, 0)
    assert "data.max_length=10: 4 of 8 conversations were cut" in caplog.text
    assert words(data.train.target[(data.train.target >= 0).sum(1).argmax()]) == "red red red"
    with pytest.raises(DataError, match=r"rows.jsonl, row \d+: the prompt fills data.max_length=7"):
        load(file, tokenizer, max_length=7)
    mixed = write_rows(tmp_path / "mixed.jsonl", [PAIR, {**PAIR, "prompt": "the " * 9}] * 4)
    data = load(mixed, tokenizer, max_length=9, cut_away="drop", split_seed=3)
    assert len(data.train) + len(data.test) == 4 == data.info["cut_away"]


def test_a_client_of_whom_all_is_cut_away_is_named(
    questions: Path, tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**json.loads(line), "who": "known"} for line in questions.read_text().splitlines()]
    rows += [{**PAIR, "prompt": "the " * 30, "who": f"lost {k % 2}"} for k in range(6)]
    file = write_rows(questions, rows)
    data = load(file, tokenizer, client="who", max_length=12, cut_away="drop")
    _, facts = make_partition(data, name="auto", clients=None, seed=0)
    assert (facts["clients"], facts["clients_without_rows"]) == (1, 2)
    assert facts["without_rows"] == ["lost 0", "lost 1"]
    assert "lost 0, lost 1" in caplog.text
    _, divided = make_partition(data, name="iid", clients=3, seed=0)
    assert "clients_without_rows" not in divided  # nobody is a client by the column


def test_packed_conversations_do_not_see_each_other(questions: Path, tokenizer: str) -> None:
    """The logits of packed tokens are those of the conversations alone."""
    from fedraclora.models.hf import build_causal_lm

    given = {"client": "who", "test_fraction": 0.25}
    alone = load(questions, tokenizer, **given)
    packed = load(questions, tokenizer, **given, packing=True, max_length=40)
    assert len(packed.train) < len(alone.train) / 3
    assert packed.train.inputs.keys() == {"input_ids", "position_ids"}
    assert int((packed.train.target >= 0).sum()) == int((alone.train.target >= 0).sum())
    counts = np.unique(packed.columns["client"], return_counts=True)[1]
    assert counts.tolist() == [4, 4, 4]  # 15 conversations of 9 tokens, four in a row of 40
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
              "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    model = build_causal_lm(shape=(), classes=alone.classes, seed=0, config=config).model.double()
    rows = np.flatnonzero(alone.columns["client"] == packed.columns["client"][0])[:4]
    apart = model(**{n: v[rows] for n, v in alone.train.inputs.items()}).logits
    together = model(**{n: v[:1] for n, v in packed.train.inputs.items()}).logits
    kept = alone.train.inputs["attention_mask"][rows].bool()
    torch.testing.assert_close(together[0, : int(kept.sum())], apart[kept], rtol=0, atol=1e-6)


def test_a_tokenizer_without_a_template_needs_one(tmp_path: Path, bare_tokenizer: str) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [PAIR] * 2)
    with pytest.raises(ConfigError, match="no chat template"):
        load(file, bare_tokenizer)
    given = "{% for m in messages %}{{ m['content'] }} {{ eos_token }} {% endfor %}"
    data = load(file, bare_tokenizer, template=given)
    assert words(data.train.target[0]) == "red </s>"
    (tmp_path / "chat.jinja").write_text(given)
    same = load(file, bare_tokenizer, template=str(tmp_path / "chat.jinja"))
    assert torch.equal(same.train.target, data.train.target)
    with pytest.raises(ConfigError, match="neither a file nor a Jinja template"):
        load(file, bare_tokenizer, template="missing.jinja")
    with pytest.raises(DataError, match=r"row 1: .*no tools here"):
        load(file, bare_tokenizer, template="{{ raise_exception('no tools here') }}")


def test_a_template_that_rewrites_what_it_wrote_is_refused(tokenizer: str) -> None:
    last = "{{ messages[-1]['content'] }}"  # forgets all but the last message
    chat = Chat(tokenizer, root=None, template=last)
    pair = tuple({"role": r, "content": c} for r, c in [("user", "red"), ("assistant", "blue")])
    with pytest.raises(DataError, match=r"row 5: the chat template .*answer"):
        chat.encode([Conversation(pair, "there, row 5")])


@pytest.mark.parametrize(
    ("row", "keys", "said"),
    [
        ({**PAIR, "response": " "}, {}, "row 2: .*response"),
        ({**PAIR, "response": None}, {}, "row 2: .*response"),
        ({"messages": [CHAT["messages"][0]]}, {}, "row 2: .*end with"),
        ({"messages": CHAT["messages"][1:]}, {}, "row 2: .*begin with"),
        ({"messages": []}, {}, "row 2: .*begin with"),
        ({"messages": [{"role": "judge", "content": "red"}]}, {}, "row 2: .*judge"),
        ({"messages": 3}, {}, "row 2: messages .*'3'"),
        ({"text": "red"}, {}, "row 2.*response"),
        ({**PAIR, "who": None}, {"client": "who"}, r"row 2: .*who .*data\.client"),
        ({**PAIR, "who": "b"}, {"client": "whom"}, r"data\.client.*'whom'"),
    ],
)
def test_a_row_or_key_that_cannot_be_used_is_named(
    row: dict[str, Any], keys: dict[str, str], said: str, tmp_path: Path, tokenizer: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{**PAIR, "who": "a"} if keys else PAIR, row])
    with pytest.raises((DataError, ConfigError), match=said):
        load(file, tokenizer, **keys)


def test_more_clients_than_rows_are_refused(tmp_path: Path, tokenizer: str) -> None:
    data = load(write_rows(tmp_path / "rows.jsonl", [PAIR] * 6), tokenizer)
    with pytest.raises(ConfigError, match="partition=iid"):
        make_partition(data, name="iid", clients=9, seed=0)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "{not json}\n", "line 1 .*JSON"),
        ("a.jsonl", "[1]\n", "line 1 .*JSON object"),
        ("a.jsonl", "\n", "no rows"),
        ("a.csv", "prompt,response\na\n", "line 2: 1 fields.* 2"),
        ("a.txt", "a", r"\.csv"),
    ],
)
def test_what_is_no_table_is_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises((DataError, ConfigError), match=said):
        read_conversations(tmp_path / name, RowForm())


def test_a_prompt_without_a_response_is_refused() -> None:
    with pytest.raises(ConfigError, match="set both"):
        RowForm(prompt="prompt")


def test_glue_as_questions(data_root: Path, tokenizer: str) -> None:
    data = load_glue_instructions(tokenizer=tokenizer, root=str(data_root), rows=30, test_rows=5)
    names, counts = np.unique(data.columns["client"], return_counts=True)
    assert [name.partition(":")[0] for name in names] == ["cola"] * 4 + ["sst2"] * 4
    assert counts.tolist() == [30] * 8
    assert (len(data.test), data.info["tasks"]) == (10, ["sst2", "cola"])
    again = load_glue_instructions(tokenizer=tokenizer, root=str(data_root), rows=30, test_rows=5)
    assert torch.equal(again.train.target, data.train.target)
    with pytest.raises(ConfigError, match="cola has 17 sources"):
        load_glue_instructions(tokenizer=tokenizer, root=str(data_root), clients_per_task=18)
    assert {answer for task in TASKS.values() for answer in (task.form.answers or {}).values()} == {
        "negative", "positive", "yes", "no",
    }  # fmt: skip
