"""The chunk of a run: planned once, said, stored, and kept when the run goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fedraclora.compose.overrides import composed
from fedraclora.config import pretraining
from fedraclora.config.build import build_task
from fedraclora.config.run_config import from_plain
from fedraclora.errors import CheckpointError
from fedraclora.run.recorder import resolved_setting
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.server.loop import loop_of
from fedraclora.training import chunking
from fedraclora.tree import digest
from fedraclora.weights.files import load_checkpoint, save_checkpoint
from tests.common import assemble, simulated, summary_of

WORDS = (
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "model.hidden=[12]",
    "clients=50",
    "clients_per_round=40",
    "rounds=4",
    "local.lr=0.1",
    "output=study",
    "output.checkpoint_every=2",
)


def job(folder: Path | None, *words: str, resume: bool = False) -> RunBuilder:
    return assemble(from_plain(composed([*WORDS, *words]), METHODS), folder, resume=resume)


def bits(run: RunBuilder) -> tuple[str, str]:
    return digest(run.strategy.state.base), run.strategy.recorder.ledger.digest()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """A budget in which nine clients train together."""
    found = job(None).chunk.memory
    assert found is not None
    monkeypatch.setattr(chunking, "CACHE_BYTES", 10**12)
    monkeypatch.setattr(chunking, "HOST_BYTES", found.training(9))
    return 9


@pytest.mark.parametrize(
    ("engine", "limit"), [("vectorized", None), ("ray", None), ("deploy", 5.0)]
)
def test_only_an_engine_without_limits_of_its_own_gets_one_for_the_round(
    engine: str, limit: float | None
) -> None:
    words = [f"engine={engine}", *(["engine.timeout=5"] if engine != "vectorized" else [])]
    config = from_plain(composed([*WORDS, *words]), METHODS)
    loop = loop_of(config, build_task(config), 8, torch.float32)
    assert loop.timeout == limit


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_chunk(
    small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job(tmp_path / "whole")
    assert (whole.chunk.chunk, whole.chunk.reason) == (small, "memory")
    whole.strategy.run(whole.grid)
    part = job(tmp_path / "part")
    part.strategy.run(part.grid, last=2)
    monkeypatch.setattr(chunking, "HOST_BYTES", 10**12)
    assert job(None).chunk.chunk == 40  # what would be planned now
    rest = job(tmp_path / "part", resume=True)
    assert str(rest.chunk) == "9 clients (as it began)"
    assert rest.strategy.loop.chunk == small
    rest.strategy.run(rest.grid)
    assert bits(rest) == bits(whole)


def test_another_chunk_that_is_asked_for_is_refused(small: int, tmp_path: Path) -> None:
    part = job(tmp_path)
    part.strategy.run(part.grid, last=2)
    with pytest.raises(CheckpointError, match=r'engine\.chunk: "auto" -> 9'):
        job(tmp_path, f"engine.chunk={small}", resume=True)


def test_the_stored_chunk_is_read_off_the_checkpoint(tmp_path: Path) -> None:
    tensors = {"base/w": torch.zeros(1)}
    for fixed, wanted in (
        ({"resolved": {"chunk": 7}}, 7),
        ({"resolved": {"device": "cpu"}}, None),
        ({}, None),
    ):
        save_checkpoint(tmp_path / "checkpoint", tensors, {"round": 2, "fixed": fixed})
        assert resolved_setting(tmp_path, "chunk") == wanted


def test_a_new_run_stores_its_chunk_among_what_fixes_the_bits(small: int, tmp_path: Path) -> None:
    run = job(tmp_path)
    run.strategy.run(run.grid, last=2)
    _, meta = load_checkpoint(tmp_path / "checkpoint")
    assert meta["fixed"]["resolved"] == {  # type: ignore[index]
        "chunk": small,
        "device": "cpu",
        "dtype": "float32",
        "summation_block": 32,
    }


def test_the_plan_is_printed_and_stands_in_the_summary(
    small: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ["output.progress=true", "output.verbose=true"]
    plain = composed([*WORDS, "rounds=1", f"output.dir={tmp_path}", *shown])
    simulated(plain, tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"chunk: 9 clients \(memory\): [\d.]+ MB each \(.* MB on cpu, beside", said)
    summary = summary_of(tmp_path)
    assert summary["chunk"] == small
    assert summary["chunk_plan"].items() >= {"chunk": small, "reason": "memory"}.items()
    assert summary["chunk_plan"]["budget"] == chunking.HOST_BYTES
    assert summary["chunk_plan"]["trained"] > 0


def test_pretrained_weights_are_made_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*words: str) -> tuple[str, object]:
        config = from_plain(composed([*WORDS, "pretrain=digits_0_4", *words]), METHODS)
        task = build_task(config).task
        return digest(dict(task.model.named_parameters())), task.info["pretrain"]

    monkeypatch.setattr(pretraining, "_MADE", {})
    first, other = built("pretrain.epochs=2"), built("pretrain.epochs=2", "seed=1")
    assert first != other

    def refuse(*_: object, **__: object) -> dict[str, float]:
        raise AssertionError("pretrained again")

    monkeypatch.setattr(pretraining, "pretrain", refuse)
    assert built("pretrain.epochs=2") == first
    assert built("pretrain.epochs=2", "seed=1", "local.lr=0.3") == other
    with pytest.raises(AssertionError, match="again"):
        built("pretrain.epochs=3")
