"""`fedraclora bench device=cuda`: throughput, the largest chunk, bf16-mixed and the card's name."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend import NAME, Card

from fedraclora.experiments.bench.command import parse, run
from fedraclora.experiments.bench.rows import BUILDERS
from fedraclora.experiments.bench.table import Report, tables
from fedraclora.experiments.bench.usage import Laps
from fedraclora.experiments.bench.workloads import WORKLOADS, Case, Workload, network, vectors
from fedraclora.training.cohort import CohortTrainer

ROWS = ("vectorized", "bf16", "central", "inline", "idle", "fedavg", "loop", "pfl")
SMALL = Workload(
    "6 clients",
    6,
    1,
    partial(network, "mlp", 3, shape=[7], hidden=[5]),
    partial(vectors, 7, 3),
    "fc2",
    ROWS,
    samples=8,
    batch=4,
)
THERE, HERE = torch.device("cuda"), torch.device("cpu")
FITS = 20  # clients, on the pretended card


@pytest.fixture
def workload(card: Card, monkeypatch: pytest.MonkeyPatch) -> Workload:
    """A workload, on a card that holds 20 clients; a real one has a real workload."""
    if card.pretended is None:
        return WORKLOADS["B"]
    train = CohortTrainer.train

    def bounded(self: Any, base: Any, downlink: Any, clients: torch.Tensor, **k: Any) -> Any:
        if len(clients) > FITS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(self, base, downlink, clients, **k)

    monkeypatch.setattr(CohortTrainer, "train", bounded)
    monkeypatch.setitem(WORKLOADS, "B", SMALL)
    return SMALL


@pytest.mark.slow
def test_the_command_reports_what_a_card_does(
    card: Card, workload: Workload, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "vectorized,bf16,central,inline,idle,fedavg,loop,pfl"
    words = ["device=cuda", "size=B", f"rows={rows}", "rounds=2", f"out={tmp_path}"]
    assert run(parse([*words, "peers=nowhere"])) == 0
    said = capsys.readouterr().out
    name = NAME if card.pretended else torch.cuda.get_device_name()
    assert (
        "| s a round | samples a s | peak MB on the GPU | time / central | largest chunk |" in said
    )
    assert f"{name}; torch {torch.__version__}" in said
    assert "times the samples a second of float32." in said
    assert "missing: pfl: not installed" in said
    found = json.loads((tmp_path / "B.json").read_text())
    assert (found["about"]["device"], found["about"]["card"]) == ("cuda", name)
    assert found["rows"].keys() == {*workload.rows} - {"pfl", "flower", "fedlab", "fedjax"}
    for row in ("vectorized", "bf16"):
        most = found["rows"][row]["largest_chunk"]
        assert most >= 18
        assert not card.pretended or most <= FITS
    assert not {"largest_chunk"} & found["rows"]["central"].keys()
    assert all(row["peak_bytes"] > 0 for row in found["rows"].values())
    assert Report.read(tmp_path / "B.json").rows == found["rows"]
    assert tables(tmp_path) in said


@pytest.mark.parametrize("row", ["fedavg", "loop"])
def test_the_rows_do_the_work_of_the_cpu(row: str, card: Card) -> None:
    ends = []
    for device in (THERE, HERE):
        made = BUILDERS[row](Case(SMALL, device))
        made.round(Laps(children=False))
        made.close()
        assert made.weights is not None
        ends.append(made.weights())
    card.assert_near(*ends, 1e-5)


def test_peers_are_left_out_on_a_card(card: Card, tmp_path: Path) -> None:
    from fedraclora.experiments.bench.command import measure

    (tmp_path / "pfl" / "bin").mkdir(parents=True)
    (tmp_path / "pfl" / ".installed").touch()
    config = parse(["device=cuda", "size=B", "rows=pfl", "rounds=1", f"peers={tmp_path}"])
    report = measure("B", Case(replace(SMALL), THERE), config)
    assert report.missing == {"pfl": "peers are timed on the CPU only"}
    assert report.rows == {}


def test_central_trains_where_its_model_lies(card: Card) -> None:
    from fedraclora.experiments.bench.rows import Central

    case = Case(SMALL, THERE)
    limit = Central(SMALL, replace(case.task, model=copy.deepcopy(case.task.model)), 3)
    limit.round()
    assert {p.device.type for p in limit.trained} == {"cuda"}
    assert all(float(p.detach().abs().max()) > 0 for p in limit.trained)
