"""A small tokenizer with a chat template, and a file of questions that a tiny model can learn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from chats import TEMPLATE, save_tokenizer, write_rows


@pytest.fixture(scope="session")
def bare_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tokenizer by words, without a chat template."""
    return save_tokenizer(tmp_path_factory.mktemp("bare"), None)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with a chat template."""
    return save_tokenizer(tmp_path_factory.mktemp("chat"), TEMPLATE)


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
