"""How a tuning ends where a test seed diverges, the disk is full or its file is damaged."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import event
from sqlalchemy.engine import Engine

from fedraclora.commands.status import explained
from fedraclora.errors import CheckpointError, DivergenceError
from fedraclora.tuning import search
from tests.unit.test_tune import ended, tuned

WORDS = ("tune.runs=2", "tune.sizes=[0.001,1]", "tune.test_seeds=[0,1,2]")


@contextmanager
def diverging(monkeypatch: pytest.MonkeyPatch, *seeds: int) -> Iterator[None]:
    """Let runs under these seeds diverge."""
    plainly = search.Search.execute

    def execute(self: search.Search, plain: Any, seed: int, *watching: Any) -> Any:
        if seed in seeds:
            raise DivergenceError("round 2: training diverged")
        return plainly(self, plain, seed, *watching)

    with monkeypatch.context() as patched:
        patched.setattr(search.Search, "execute", execute)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(1,), (0, 2), (0, 1, 2)])
def test_a_test_seed_that_diverges_is_named_beside_the_others(
    seeds: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with diverging(monkeypatch, *seeds):
        found = tuned(tmp_path, *WORDS, "output.progress=true")
    scores = found.test[1.0]
    assert [seed for seed, score in enumerate(scores) if math.isnan(score)] == [*seeds]
    marked = f"DIVERGED (seeds {', '.join(map(str, seeds))})"
    printed = capsys.readouterr().out
    assert marked in printed
    for preset in (tmp_path / "experiment").iterdir():
        assert marked in preset.read_text()
        assert yaml.safe_load(preset.read_text())["rounds"] == 2
    assert ("experiment=at_" in printed) == (found.test.keys() == set())  # none is offered


@pytest.mark.slow
def test_a_preset_that_did_not_diverge_is_the_one_that_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedraclora.tuning import result

    monkeypatch.setattr(result, "test_once", lambda _s, _t, point, _c: [point.traffic] * 3)
    found = tuned(tmp_path, *WORDS, "output.progress=true")
    assert f"experiment=at_{max(found.configs):g}MB" in capsys.readouterr().out
    tests = {0.5: [0.8, 0.9], 1.0: [0.8, math.nan]}
    assert "at_0.5MB" in result.how_to_run(tmp_path, {0.5: {}, 1.0: {}}, tests)
    assert "at_1MB" in result.how_to_run(tmp_path, {0.5: {}, 1.0: {}}, {})


@pytest.mark.slow
def test_an_interrupted_test_still_says_how_to_run_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedraclora.tuning import result

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(result, "test_once", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, *WORDS, "output.progress=true")
    assert "experiment=at_1MB" in capsys.readouterr().out


@contextmanager
def limited(pages: int) -> Iterator[None]:
    """Let SQLite find no room for more pages, as on a full disk."""

    def limit(connection: Any, _: object) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}")

    event.listen(Engine, "connect", limit)
    try:
        yield
    finally:
        event.remove(Engine, "connect", limit)


@pytest.mark.slow
@pytest.mark.parametrize("runs", [0, 2])
def test_a_full_disk_says_what_is_kept_and_how_to_go_on(runs: int, tmp_path: Path) -> None:
    """It is full before the first run, or after some."""
    if runs:
        tuned(tmp_path, f"tune.runs={runs}")
    pages = (tmp_path / "tune.db").stat().st_size // 4096 if runs else 10
    with limited(pages), pytest.raises(OSError, match=r"tune\.db") as raised:
        tuned(tmp_path, "tune.runs=9")
    assert raised.value.errno == errno.ENOSPC
    told = explained(raised.value)
    assert told is not None
    assert "make room" in told
    assert "the same command" in told
    known = [trial.params for trial in ended(tmp_path)] if runs else []
    assert len(known) >= runs
    tuned(tmp_path, "tune.runs=9")  # as it says
    assert len(ended(tmp_path)) == 9
    assert [trial.params for trial in ended(tmp_path)][: len(known)] == known


def test_a_damaged_file_of_trials_is_named(tmp_path: Path) -> None:
    (tmp_path / "tune.db").write_bytes(b"no database" * 100)
    with pytest.raises(CheckpointError, match=r"tune\.db is damaged.*another folder"):
        tuned(tmp_path, "tune.runs=1")
