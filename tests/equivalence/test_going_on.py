"""A run may go on under other values of keys that move no bit, and under no other ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedraclora.commands.simulate import run_one
from fedraclora.compose.overrides import composed
from fedraclora.compose.resume import resume_config
from fedraclora.errors import CheckpointError, DataError
from fedraclora.rng import generator
from fedraclora.run.folder import read_config, read_summary
from fedraclora.run.ledger import read_ledger

JOB = [
    "data=least_squares",
    "data.clients=6",
    "data.features=7",
    "data.outputs=5",
    "data.labels=null",
    "clients=null",
    "clients_per_round=3",
    "partition=given",
    "model=linear",
    "pretrain=none",
    "method.rank=2",
    "local.lr=0.05",
    "engine.chunk=1",
    "output.plots=false",
    "output.progress=false",
    "output.checkpoint_every=2",
]
OWN = [
    "data=own",
    "clients=3",
    "clients_per_round=2",
    "data.classes=3",
    "data.shape=[5]",
    "partition=given",
    "pretrain=none",
    "data.labels=null",
    "model=mlp",
    "model.hidden=[4]",
    "output.plots=false",
    "output.progress=false",
    "output.checkpoint_every=2",
]
Go = Callable[..., dict[str, object]]


def run(folder: Path, *words: str, job: list[str] = JOB) -> dict[str, object]:
    """Run in a folder, as a command would."""
    return run_one(composed([*job, *words, f"output.dir={folder}"]), [], None)


def resume(folder: Path, *words: str) -> dict[str, object]:
    """Go on with the run of a folder, as a command would."""
    asked = [f"resume={folder}", *words]
    return run_one(composed(asked), [w.partition("=")[0] for w in asked], None)


def unfinished(folder: Path, *words: str, job: list[str] = JOB) -> Path:
    """A run of two rounds that is to have four, and stands at its checkpoint."""
    run(folder, *words, "rounds=2", job=job)
    return folder


def bits(summary: dict[str, object]) -> object:
    return summary["weights_digest"], summary["ledger_digest"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return run(tmp_path_factory.mktemp("whole") / "run", "rounds=4")


def test_a_finished_run_is_extended_to_the_bits_of_a_longer_one(
    whole: dict[str, object], tmp_path: Path
) -> None:
    folder = unfinished(tmp_path / "run")
    assert resume(folder)["rounds"] == 2  # nothing is asked for: it stays finished
    assert bits(resume(folder, "rounds=4")) == bits(whole)
    assert read_config(folder)["rounds"] == 4
    incidents = [row.get("incidents") for row in read_ledger(folder / "ledger.jsonl")]
    assert incidents == [None, None, None, ["goes on with rounds: 2 -> 4"], None]
    with pytest.raises(CheckpointError, match=r"rounds: 4 -> 3 .*round 4"):
        resume(folder, "rounds=3")


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["engine=inline"], {"engine": {"name": "inline", "chunk": 1, "threads": 1}}),
        (["max_failures=2"], {"max_failures": 2}),
        (["device=cpu"], {"device": "cpu"}),
        (["evaluate.batch_size=3"], {}),
        (["output.checkpoint_every=1"], {}),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_keys_that_move_no_bit_are_taken_and_written_down(
    words: list[str], kept: dict[str, object], whole: dict[str, object], tmp_path: Path
) -> None:
    folder = unfinished(tmp_path / "run")
    found = resume(folder, "rounds=4", *words)
    assert found["weights_digest"] == whole["weights_digest"]
    assert kept.items() <= read_config(folder).items()
    said = read_ledger(folder / "ledger.jsonl")[3]["incidents"]
    assert any(words[0].partition("=")[0] in line for line in said) or "output" in words[0]  # type: ignore[attr-defined]


def test_metrics_may_be_measured_at_other_rounds(whole: dict[str, object], tmp_path: Path) -> None:
    folder = unfinished(tmp_path / "run")
    found = resume(folder, "rounds=4", "evaluate.every=2")
    assert found["weights_digest"] == whole["weights_digest"]
    measured = [bool(row["metrics"]) for row in read_ledger(folder / "ledger.jsonl")]
    assert measured == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["output.dir=elsewhere"], r"output\.dir: .*run -> elsewhere"),
        (["engine=ray", "engine.chunk=2"], r"engine\.chunk: 1 -> 2 \(it changes the results\)"),
        (["engine.threads=2"], r"engine\.threads: 1 -> 2"),
        (["seed=1"], "seed: 0 -> 1"),
        (["evaluate.split=validation"], r'evaluate\.split: "test" -> "validation"'),
        (["local.lr=0.5", "method=fedavg"], r"(?s)local\.lr: 0\.05 -> 0\.5.*method\.name"),
    ],
)
def test_other_keys_are_refused_by_name(words: list[str], said: str, tmp_path: Path) -> None:
    folder = unfinished(tmp_path / "run")
    kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=said):
        resume(folder, *words)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == kept


@pytest.mark.parametrize(
    ("setting", "word", "said"),
    [
        ("local.schedule=cosine", "rounds=4", r"local\.schedule=cosine .*all rounds"),
        ("privacy.target_epsilon=50", "rounds=4", r"privacy\.target_epsilon is planned"),
        ("stop.patience=9", "evaluate.every=2", r"evaluate\.every: 1 -> 2"),
        ("output.chain=false", "output.chain=true", "of its first rounds"),
    ],
)
def test_what_was_planned_over_the_whole_run_stays(
    setting: str, word: str, said: str, tmp_path: Path
) -> None:
    """Checked on the configs alone: nothing is trained."""
    private = [
        "privacy=client_level",
        "aggregation_weights=uniform",
        "privacy.noise_multiplier=null",
    ]
    more = private if "privacy" in setting else []
    stored = composed([*JOB, *more, "rounds=2", setting])
    asked = composed([*JOB, word])
    with pytest.raises(CheckpointError, match=said):
        resume_config(tmp_path, stored, asked, [word.partition("=")[0]])


def test_an_engine_that_finds_its_chunk_keeps_that_of_the_run(tmp_path: Path) -> None:
    stored = composed([*JOB, "engine.chunk=5"])
    found = resume_config(tmp_path, stored, composed([*JOB[:-5], "engine=ray"]), ["engine"])
    assert found["engine"] == {
        **composed(["engine=ray"])["engine"],  # type: ignore[dict-item]
        "chunk": 5,
    }
    again = resume_config(
        tmp_path, found, composed(["engine=ray", "engine.workers=2"]), ["engine", "engine.workers"]
    )
    assert again["engine"] == {**found["engine"], "workers": 2}  # type: ignore[dict-item]


def samples(folder: Path) -> Path:
    folder.mkdir()
    rng = generator(0, "samples")
    for name in ("0", "1", "2", "held"):
        x = rng.normal(size=(6, 5)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, target=rng.integers(0, 3, 6))
    return folder


@pytest.mark.slow
def test_samples_may_move_and_may_not_change(tmp_path: Path) -> None:
    data = samples(tmp_path / "data")
    words = [f"data.samples={data}", f"data.test_file={data / 'held.npz'}"]
    wanted = run(tmp_path / "whole", *words, "rounds=4", job=OWN)
    folder = unfinished(tmp_path / "run", *words, job=OWN)
    moved = tmp_path / "moved"
    data.rename(moved)
    now = ["data=own", f"data.samples={moved}", f"data.test_file={moved / 'held.npz'}", "rounds=4"]
    shutil.copy(moved / "1.npz", tmp_path / "kept.npz")
    shutil.copy(moved / "0.npz", moved / "1.npz")
    with pytest.raises(DataError, match=r"moved: 1\.npz.*client 1, has changed"):
        resume(folder, *now)
    (moved / "1.npz").unlink()
    with pytest.raises(DataError, match=r"1\.npz.*client 1, is missing"):
        resume(folder, *now)
    assert read_summary(folder)["rounds"] == 2  # nothing is lost
    shutil.copy(tmp_path / "kept.npz", moved / "1.npz")
    assert bits(resume(folder, *now)) == bits(wanted)
