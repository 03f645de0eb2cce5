from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.errors import CheckpointError
from fedraclora.run.ledger import (
    NONDETERMINISTIC,
    Ledger,
    column,
    digest_rows,
    headline,
    number,
    read_ledger,
    round_seconds,
)


def row(round_: int, **more: object) -> dict[str, object]:
    return {"round": round_, "train_loss": 1.0 / (round_ + 1), **more}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ledger.jsonl"


def filled(path: Path | None, rounds: int) -> Ledger:
    ledger = Ledger(path)
    for round_ in range(rounds):
        ledger.append(row(round_, seconds={"total": 0.1 * round_}), sync=False)
    return ledger


def test_a_reader_gets_the_rows_that_were_written(path: Path) -> None:
    ledger = Ledger(path)
    ledger.append(
        {
            "round": 1,
            "metrics": {"f1": np.float32(0.5), "accuracy": torch.tensor(0.25)},
            "failures": [{"client": np.int64(7), "reason": "norm"}],
            "shape": (2, 3),
            "vector": np.arange(3),
            "loss": math.nan,
            "report": {"error": math.inf},
            "nothing": None,
            "flag": True,
        }
    )
    assert read_ledger(path) == ledger.rows
    assert ledger.rows == [
        {
            "round": 1,
            "metrics": {"f1": 0.5, "accuracy": 0.25},
            "failures": [{"client": 7, "reason": "norm"}],
            "shape": [2, 3],
            "vector": [0, 1, 2],
            "loss": None,
            "report": {"error": None},
            "nothing": None,
            "flag": True,
        }
    ]
    assert headline(read_ledger(path)) == "f1"  # key order is kept


def test_every_line_is_strict_json(path: Path) -> None:
    Ledger(path).append(row(1, loss=math.inf, other=-math.inf))

    def refuse(name: str) -> float:
        raise AssertionError(name)

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_rows_are_on_the_disk_at_once(path: Path) -> None:
    ledger = Ledger(path)
    for round_ in range(3):
        ledger.append(row(round_))
        assert len(read_ledger(path)) == round_ + 1


def test_no_path_keeps_rows_in_memory_only(tmp_path: Path) -> None:
    ledger = filled(None, 4)
    ledger.cut(1)
    assert [r["round"] for r in ledger.rows] == [0, 1]
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_continued(path: Path) -> None:
    filled(path, 3)
    again = Ledger(path)
    again.append(row(3))
    assert column(read_ledger(path), "round").tolist() == [0, 1, 2, 3]


@given(st.integers(1, 60))
def test_a_torn_last_line_is_left_out_and_written_over(cut: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        filled(path, 4)
        data = path.read_bytes()
        path.write_bytes(data[:-cut])
        rows = read_ledger(path)
        # Without its newline alone the last row is whole; otherwise it is gone.
        assert len(rows) == (4 if cut == 1 else data[:-cut].count(b"\n"))
        ledger = Ledger(path)
        ledger.append(row(9))
        assert read_ledger(path) == [*rows, row(9)]


def test_a_torn_utf8_character_is_a_torn_line(path: Path) -> None:
    filled(path, 2)
    path.write_bytes(path.read_bytes() + b'{"round": 2, "notes": ["\xc3')
    assert len(read_ledger(path)) == 2


@pytest.mark.parametrize(
    "bad", ["not json", "[1, 2]", '{"loss": 1}', '{"round": 0}', '{"round": "2"}']
)
def test_damage_elsewhere_names_file_and_line(path: Path, bad: str) -> None:
    filled(path, 4)
    lines = path.read_text().splitlines()
    lines[2] = bad
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl, line 3 is damaged"):
        read_ledger(path)
    with pytest.raises(CheckpointError, match="line 3"):
        Ledger(path)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no ledger .*ledger\.jsonl"):
        read_ledger(path)


@pytest.mark.parametrize("round_", [2, 1, "3", None, 2.5])
def test_rounds_must_increase(path: Path, round_: object) -> None:
    ledger = filled(path, 3)
    with pytest.raises(CheckpointError, match="integer above 2"):
        ledger.append({"round": round_})
    assert len(read_ledger(path)) == len(ledger.rows) == 3


def test_what_json_cannot_hold_is_refused_by_column(path: Path) -> None:
    ledger = filled(path, 1)
    with pytest.raises(CheckpointError, match=r"column report\.x.* object"):
        ledger.append(row(1, report={"x": object()}))
    assert len(read_ledger(path)) == len(ledger.rows) == 1


def test_cut_then_append_equals_never_having_gone_on(path: Path, tmp_path: Path) -> None:
    ledger = filled(path, 6)
    ledger.cut(2)
    assert read_ledger(path) == ledger.rows == filled(None, 3).rows
    for round_ in range(3, 6):
        ledger.append(row(round_, seconds={"total": 99.0}))
    assert ledger.digest() == filled(None, 6).digest()
    assert [p.name for p in path.parent.iterdir()] == ["ledger.jsonl"]


def test_rows_are_read_from_the_file_as_a_list_has_them(path: Path) -> None:
    ledger, known = filled(path, 6), [*filled(None, 6).rows]
    for again in (ledger, Ledger(path)):
        assert [*again.rows] == known
        assert [again.rows[k] for k in range(-6, 6)] == known + known
        assert again.rows[1:5:2] == known[1:5:2]
        for index in (6, -7):
            with pytest.raises(IndexError):
                again.rows[index]
        assert all(map(again.has, known))
        assert not again.has({**known[3], "loss": 17.0})
        assert not again.has(row(6))


def test_a_long_run_keeps_its_rows_in_the_file_alone(path: Path) -> None:
    about = {"failures": [{"client": k, "reason": "it is not connected"} for k in range(20)]}
    ledger = Ledger(path)
    ledger.append(row(0, **about))
    tracemalloc.start()
    try:
        for round_ in range(1, 201):
            ledger.append(row(round_, **about), sync=False)
        kept = tracemalloc.get_traced_memory()[0] / 200
    finally:
        tracemalloc.stop()
    assert len(ledger.rows) == 201
    assert kept < 200  # bytes a round: its checksum and place; the row has some 10,000


def test_a_kill_while_cutting_leaves_the_old_rows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = filled(path, 6)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        ledger.cut(2)
    assert len(read_ledger(path)) == 6


def test_the_digest_leaves_out_clocks_and_memory_only() -> None:
    base = filled(None, 3).rows
    for name in NONDETERMINISTIC:
        assert digest_rows([{**r, name: 123.0} for r in base]) == digest_rows(base)
    assert digest_rows([{**r, "uplink_bytes": 1} for r in base]) != digest_rows(base)
    assert digest_rows(base[:2]) != digest_rows(base)


def test_the_digest_does_not_see_key_order_and_survives_the_file(path: Path) -> None:
    ledger = filled(path, 3)
    turned = [dict(reversed(r.items())) for r in ledger.rows]
    assert digest_rows(turned) == ledger.digest() == digest_rows(read_ledger(path))


def test_columns_are_nan_where_a_row_has_no_number() -> None:
    rows = [{"round": 1, "m": {"x": 2}}, {"round": 2}, {"round": 3, "m": {"x": None}}]
    np.testing.assert_array_equal(column(rows, "m", "x"), [2.0, math.nan, math.nan])
    assert column([], "m").shape == (0,)
    assert math.isnan(number({"m": 3}, "m", "x"))


def test_headline_is_the_first_metric_that_was_measured() -> None:
    assert headline([{"round": 0, "metrics": {}}, {"round": 1, "metrics": {"f1": 1}}]) == "f1"
    assert headline([{"round": 0}]) is None


def test_round_seconds_is_the_total_or_the_sum() -> None:
    assert round_seconds({"seconds": {"total": 2.0, "train": 1.0}}) == 2.0
    assert round_seconds({"seconds": {"open": 0.5, "train": 1.0, "x": None}}) == 1.5
    assert round_seconds({"round": 1}) == 0.0
