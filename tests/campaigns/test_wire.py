"""A short form of the campaign, and the messages that once ended a run, by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from fedraclora.engines.records import read_answer
from fedraclora.experiments.faults.grid import become_a_task
from fedraclora.run.ledger import Ledger
from tests.campaigns.mutants import claimed, deep, stored
from tests.campaigns.wire import Case, campaign, collected, frames, judged, read, scene_of


@pytest.mark.slow
@pytest.mark.parametrize("count", [500, pytest.param(1500, marks=pytest.mark.long)])
def test_mutants(count: int) -> None:
    assert sum(campaign(count, first=100_000).values()) == count


def test_damaged_frames() -> None:
    counts = frames(800)
    assert sum(counts.values()) == 800
    assert counts["frame refused"] > 700


SHAPES: list[Any] = [5, None, [5], [["w"]], [["w", [-1]]], [["w", [2**62]]], [[5, [2]]], deep(900)]
ENDED = {
    "notes": [5, None, "x", [5], [deep(900)], {"a": "b"}, ["x"] * 101],
    "failures": [5, None, [], {"x": "y"}, {"1": 5}, {"01": "y"}, {"1": deep(900)}],
    "refused": [5, None, {}, [5], [[1]], [["1", "x"]], [[1, None]], deep(900)],
    "round_": [True, 3.0, "3", None, 2**63, 10**400],
    "is": [0, None, "summed", "nothing", []],
    "layout": [5, None, [], *({"shapes": shapes} for shapes in SHAPES)],
}


@pytest.mark.parametrize("name", ENDED)
def test_a_field_that_is_something_else_is_the_failure_of_its_client(name: str) -> None:
    become_a_task()
    scene = scene_of("rows")
    for value in ENDED[name]:
        content = read(scene.replies[1])
        header = json.loads(str(content["config"]["header"]))  # type: ignore[index]
        content["config"] = ConfigRecord({"header": json.dumps(header | {name: value})})
        answers = scene.answers()
        answers[1] = Message(content, reply_to=scene.chunks[1][0])
        verdict = judged(scene, Case("by hand", 1, answers, content), Ledger(None))
        assert verdict == "refused", value
        (failure,) = [f for f in collected(scene, answers).exchange.failures if f.client == 1]
        assert "its reply is refused: " in failure.reason
        assert len(failure.reason) < 400


def test_too_few_numbers_under_a_budget_are_the_failure_of_their_client() -> None:
    become_a_task()
    scene = scene_of("rank budgets")
    content = read(scene.replies[2])
    numbers = content["arrays"]["flat"].numpy()  # type: ignore[index, union-attr]
    data = claimed((len(numbers) - 1,), "<f4", numbers[1:].tobytes())
    content["arrays"] = ArrayRecord({"flat": stored(data)})
    answers = scene.answers()
    answers[2] = Message(content, reply_to=scene.chunks[2][0])
    assert judged(scene, Case("by hand", 2, answers, content), Ledger(None)) == "refused"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda raw: np.append(np.uint8(255), raw[1:]), "NaN or an infinity"),
        (lambda raw: np.append(np.uint8(220), raw[1:]), "update is too long"),
        (lambda raw: np.append(raw[:-1], np.uint8(128)), "clients [1] sent what"),
        (lambda raw: raw[1:], "(49,), expected 50 bytes"),
        (lambda raw: raw.astype(np.float32), "int8 came as torch.float32"),
    ],
)
def test_fewer_bits_that_are_not_what_they_should_be_are_the_failure_of_their_client(
    damage: Any, why: str
) -> None:
    become_a_task()
    scene = scene_of("fewer bits")
    content = read(scene.replies[1])
    raw = content["arrays"]["flat"].numpy()  # type: ignore[index, union-attr]
    content["arrays"] = ArrayRecord({"flat": Array(damage(raw))})
    answers = scene.answers()
    answers[1] = Message(content, reply_to=scene.chunks[1][0])
    assert judged(scene, Case("by hand", 1, answers, content), Ledger(None)) == "refused"
    (failure,) = [f for f in collected(scene, answers).exchange.failures if f.client == 1]
    assert why in failure.reason


def test_an_array_that_claims_to_be_large_takes_no_memory() -> None:
    become_a_task()
    scene = scene_of("rows")
    content = read(scene.replies[0])
    content["arrays"] = ArrayRecord({"flat": stored(claimed((10**13,), "<f4", b"\0" * 16))})
    with pytest.raises(Exception, match=r"takes 40000000000000 bytes, but the message has 16"):
        read_answer(content, scene.exchange.asks[0])


def test_texts_of_clients_are_cut_and_made_printable() -> None:
    become_a_task()
    scene = scene_of("rows")
    content = read(scene.replies[0])
    header = json.loads(str(content["config"]["header"]))  # type: ignore[index]
    notes: list[Any] = ["a\nb\x1b[2J\ud800\u202e", "y" * 5000]
    content["config"] = ConfigRecord({"header": json.dumps(header | {"notes": notes})})
    answers = scene.answers()
    answers[0] = Message(content, reply_to=scene.chunks[0][0])
    assert judged(scene, Case("by hand", 0, answers, content), Ledger(None)) == "taken"
    told = collected(scene, answers).exchange.notes
    assert told[0] == r"a\nb\x1b[2J\ud800\u202e"
    assert told[1] == "y" * 1000 + " ... (4000 characters more)"
