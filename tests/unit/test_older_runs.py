"""Run folders as a release before the codec wrote them are read, and go on as they would have.

``recorded/older_runs.tar.xz`` holds four runs of three classes of digits that stopped after round 4
of 6: links of three rounds in int4 with feedback; a basis computed from the last link; and replies
on their way to a buffered server, under fresh sketches and under one for good.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from fedraclora.experiments.cli import main
from fedraclora.run.ledger import read_ledger
from fedraclora.run.rebuild import state_at
from fedraclora.weights.files import load_checkpoint

RECORDED = Path(__file__).parent / "recorded" / "older_runs.tar.xz"
# What a run of six rounds came to there: the last metric, and all bytes up and down.
CAME = {
    "int4": (0.8218742306585665, 234, 606),
    "subspace": (0.7309487133114426, 4224, 5872),
    "buffer": (1.3020177629258898, 936, 1940),
    "buffer_ffa": (0.6659803984878344, 504, 480),
}


@pytest.fixture
def older(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of such a run."""
    with tarfile.open(RECORDED) as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path / str(request.param)


@pytest.mark.parametrize("older", CAME, indirect=True)
def test_an_older_run_goes_on_as_it_would_have(older: Path) -> None:
    kept, _ = load_checkpoint(older / "checkpoint")
    rebuilt = state_at(older, 4).base
    base = {n.removeprefix("base/"): t for n, t in kept.items() if n.startswith("base/")}
    assert base.keys() <= rebuilt.keys()
    assert all(torch.allclose(rebuilt[n], t, atol=1e-5) for n, t in base.items())
    with pytest.raises(SystemExit) as ended:
        main(["simulate", f"resume={older}", "rounds=6", "output.progress=false"])
    assert not ended.value.code
    found = read_ledger(older / "ledger.jsonl")[-1]
    metric, up, down = CAME[older.name]
    assert (found["uplink_total"], found["downlink_total"]) == (up, down)
    assert [*found["metrics"].values()][-1] == pytest.approx(metric, rel=1e-3)
