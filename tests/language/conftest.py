"""A small tokenizer with a chat template, and a file of questions that a tiny model can learn."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

WORDS = "red green blue round square what colour shape is the ball box answer user assistant".split()
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="session")
def bare_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tokenizer by words, without a chat template."""
    return save_tokenizer(tmp_path_factory.mktemp("bare"), None)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with a chat template."""
    return save_tokenizer(tmp_path_factory.mktemp("chat"), TEMPLATE)


def save_tokenizer(folder: Path, template: str | None) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: k for k, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Questions whose answers follow from them, of three clients, in JSONL."""
    facts = {("colour", "ball"): "red", ("shape", "ball"): "round", ("colour", "box"): "blue",
             ("shape", "box"): "square"}  # fmt: skip
    rows = [
        {"prompt": f"what {what} is the {thing}", "response": found, "who": f"client {k % 3}"}
        for k in range(15)
        for (what, thing), found in facts.items()
    ]
    return write_rows(tmp_path / "questions.jsonl", rows)
