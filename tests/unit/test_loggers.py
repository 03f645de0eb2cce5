"""Loggers: what each library reads back of a run that was shown to it."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fedraclora
from fedraclora.errors import ConfigError, EngineError
from fedraclora.loggers import LOGGERS, Logging, logging_to
from fedraclora.run.callback import RunStart

WORDS = ("data=digits", "pretrain=none", "output.progress=false", "model.hidden=[7]")
SIZES: dict[str, Any] = {"clients": 6, "clients_per_round": 3, "rounds": 3}


def run(folder: Path | None, *names: str, **keys: Any) -> fedraclora.RunResult:
    return fedraclora.simulate(
        *WORDS, folder=folder, output={"loggers": list(names), "plots": False}, **(SIZES | keys)
    )


def series(found: fedraclora.RunResult) -> dict[int, float]:
    return {int(r): float(v) for r, v in found.history["accuracy"].items()}


def test_tensorboard_reads_the_rounds_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("test/accuracy")}
    assert found == pytest.approx(series(done))
    assert (
        "rounds: 3" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    )
    assert [e.value for e in events.Scalars("uplink_total")][-1] == done.summary["uplink_total"]


def test_tensorboard_goes_on_where_the_run_does(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def stop(row: Any) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", "tensorboard", on_round=stop)
    done = run(tmp_path / "run", "tensorboard", resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("test/accuracy")}
    assert found == pytest.approx(series(done))


@contextmanager
def mlflow_server(place: Path) -> Iterator[str]:
    """A real MLflow server on loopback, with SQLite."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--backend-store-uri", f"sqlite:///{place}/mlflow.db", "--host", "127.0.0.1"]
    words += ["--port", str(port), "--workers", "1", "--default-artifact-root", str(place)]
    log = (place / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words],
        cwd=place,
        stdout=log,
        stderr=log,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # four processes more
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (place / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)
        log.close()


@pytest.fixture(params=["file", pytest.param("server", marks=pytest.mark.long)])
def tracking(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where MLflow keeps runs: a database that it opens itself, or one behind its server."""
    pytest.importorskip("mlflow")
    place = tmp_path / "mlflow"
    place.mkdir()
    if request.param == "file":
        yield f"sqlite:///{place}/mlflow.db"
        return
    with mlflow_server(place) as address:
        yield address


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy, about MLflow
def test_mlflow_reads_the_rounds_back(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    done = run(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fedraclora")
    (shown,) = client.search_runs([experiment.experiment_id])
    assert shown.info.status == "FINISHED"
    assert (shown.data.params["rounds"], shown.data.params["method.name"]) == ("3", "fed_rac_lora")
    history = client.get_metric_history(shown.info.run_id, "test/accuracy")
    assert {m.step: m.value for m in history} == pytest.approx(series(done))
    assert (
        json.loads((tmp_path / "run" / "loggers.json").read_text())["mlflow"] == shown.info.run_id
    )
    run(tmp_path / "run", "mlflow", rounds=4, resume=True)
    (shown,) = client.search_runs([experiment.experiment_id])  # the same, gone on with
    assert len(client.get_metric_history(shown.info.run_id, "test/accuracy")) == 5


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a file of Weights & Biases: LevelDB's log format after a header of 7 bytes."""
    raw, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if (left := 32768 - at % 32768) < 7:  # no header fits into what is left of a block
            at += left
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_reads_the_rounds_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for key, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    done = run(tmp_path / "run", "wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found: dict[int, float] = {}
    for _ in range(300):  # a process of the library's own writes the file
        records = [Record.FromString(raw) for raw in wandb_records(file)]
        if any(record.HasField("exit") for record in records):
            break
        time.sleep(0.1)
    for record in records:
        items = {"/".join(item.nested_key): item.value_json for item in record.history.item}
        if items:
            found[int(items["_step"])] = float(items["test/accuracy"])
    assert found == pytest.approx(series(done))


@pytest.mark.long
def test_trackio_reads_the_rounds_back(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    code = (
        "import sys, fedraclora, trackio\n"
        f"run = fedraclora.simulate(*{WORDS}, folder=sys.argv[1], clients=6, clients_per_round=3, "
        "rounds=3,\n"
        "    output={'loggers': ['trackio'], 'plots': False})\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "(name,) = SQLiteStorage.get_runs('fedraclora')\n"
        "rows = SQLiteStorage.get_logs('fedraclora', name)\n"
        "found = [(r['step'], r['test/accuracy']) for r in rows]\n"
        "wanted = [(int(r), float(v)) for r, v in run.history['accuracy'].items()]\n"
        "assert found == wanted, (found, wanted)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


class Broken:
    """A logger whose server goes away."""

    def __init__(self, at: str) -> None:
        self.at = at

    def begin(self, run: RunStart, known: str | None) -> None:
        self.call("begin")

    def row(self, round_: int, values: Any) -> None:
        self.call("row")

    def end(self, summary: Any, *, failed: bool) -> None:
        self.call("end")

    def call(self, name: str) -> None:
        if name == self.at:
            raise OSError("no route to the server")


def test_a_logger_that_cannot_begin_stops_the_run_before_it_has_begun() -> None:
    logging_ = Logging({"mine": Broken("begin")})
    with pytest.raises(EngineError, match=r"mine .*OSError: no route"):
        logging_.begin(RunStart("a run", {}, None))


@pytest.mark.parametrize("at", ["row", "end"])
def test_a_logger_that_fails_later_is_left_out(at: str, caplog: pytest.LogCaptureFixture) -> None:
    logging_ = Logging({"mine": Broken(at)})
    logging_.begin(RunStart("a run", {}, None))
    with caplog.at_level(logging.WARNING):
        logging_.row({"round": 1})
        logging_.row({"round": 2})
        logging_.end({})
    assert [r.getMessage().partition(" (")[0] for r in caplog.records] == [
        "mine failed and gets no further rounds"
    ]


def test_unknown_loggers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tensorbord"):
        logging_to(["tensorbord"])
    with pytest.raises(ConfigError, match="once"):
        logging_to(["wandb", "wandb"])
    for name in LOGGERS:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"wandb.*\[loggers\]"):
        logging_to(["wandb"])
