"""Tuning: what is tried and kept, the frontier, and what is found runs by itself."""

from __future__ import annotations

import contextlib
import fcntl
import math
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedraclora
from fedraclora.errors import CheckpointError, ConfigError, DivergenceError
from fedraclora.experiments import deploy
from fedraclora.experiments.overrides import composed, key_of
from fedraclora.experiments.tune import command, search
from fedraclora.experiments.tune.frontier import Point, frontier, ranks
from fedraclora.experiments.tune.result import Tuned
from fedraclora.experiments.tune.space import Space, settings
from fedraclora.protocol.quantised import FULL, ROUNDED
from fedraclora.run.folder import alone
from fedraclora.weights.files import flatten

TASK = ["data=digits", "data.labels=null", "pretrain=none", "model.hidden=[12]", "clients=4"]
TASK += ["cohort=4", "rounds=2", "local.epochs=1", "output.progress=false"]
SMALL = ["tune.rungs=[0.5]", "tune.sizes=[0.001,1]", "tune.test_seeds=[0]"]


def tuned(folder: Path, *words: str) -> Tuned:
    rest = [*TASK, f"output.dir={folder}", *(w for w in words if not w.startswith("tune."))]
    own = [*SMALL, *(word for word in words if word.startswith("tune."))]
    return command.tune_task(composed(rest), {key_of(word) for word in rest}, own)


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{folder / 'tune.db'}")
    return study.get_trials()


def ended(folder: Path, state: str = "COMPLETE") -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in trials(folder) if trial.state.name == state]


points = st.lists(st.tuples(st.integers(1, 9), st.integers(-3, 3)), max_size=12)


@given(points, st.booleans())
def test_the_frontier_is_what_no_other_point_beats(drawn: list[tuple[int, int]], up: bool) -> None:
    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        better = (a[1] >= b[1]) if up else (a[1] <= b[1])
        return a[0] <= b[0] and better and a != b

    wanted = {p for p in drawn if not any(beats(other, p) for other in drawn)}
    all_ = [Point(1, size, score) for size, score in drawn]
    found = [(p.bytes, p.score) for p in frontier(all_, higher=up)]
    assert found == sorted(wanted)
    rank = dict(zip(drawn, ranks(all_, higher=up), strict=True))
    assert {p for p in drawn if rank[p] == 0} == wanted
    assert all(rank[a] < rank[b] for a in drawn for b in drawn if beats(a, b))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tuned]:
    folder = tmp_path_factory.mktemp("tune") / "first"
    return folder, tuned(folder, "tune.runs=4")


def test_it_goes_on_with_the_same_command(first: tuple[Path, Tuned]) -> None:
    folder, before = first
    known = [trial.params for trial in ended(folder)]
    assert len(known) == 4
    after = tuned(folder, "tune.runs=5")
    assert [trial.params for trial in ended(folder)][:4] == known
    assert len(ended(folder)) == 5
    again = tuned(folder, "tune.runs=5")
    assert len(ended(folder)) == 5
    assert again.test == after.test
    assert after.frontier["run"].isin([t.number for t in ended(folder)]).all()
    with pytest.raises(CheckpointError, match="rounds"):
        tuned(folder, "rounds=3")
    with pytest.raises(CheckpointError, match=r"method\.rank"):
        tuned(folder, "tune.rank=[3]")
    assert before.test is not None


def test_the_frontier_is_that_of_what_was_measured(first: tuple[Path, Tuned]) -> None:
    folder, _ = first
    found = tuned(folder, f"tune.runs={len(ended(folder))}").frontier
    curves = [t.user_attrs["curve"] for t in ended(folder) if t.user_attrs["ended"] != "diverged"]
    all_ = {(p["bytes"], p["score"]) for curve in curves for p in curve}
    best = {p for p in all_ if not any(o[0] <= p[0] and o[1] >= p[1] and o != p for o in all_)}
    wanted = sorted(float(f"{size / 4e6:.4g}") for size, _ in best if size)
    assert found["MB a client"].tolist() == wanted
    assert found["accuracy"].is_monotonic_increasing


def test_what_is_found_runs_by_its_name_alone(first: tuple[Path, Tuned]) -> None:
    folder, found = first
    size = max(found.configs)
    words = ["--config-dir", str(folder), f"experiment=at_{size:g}MB"]
    one, other = flatten(composed(words)), flatten(found.configs[size])
    differ = {key for key in {*one, *other} if one.get(key, ...) != other.get(key, ...)}
    assert {key.partition(".")[0] for key in differ} <= {"output"}
    assert one["evaluate.split"] == "test"
    assert one["data.validation"] == 0
    request = deploy.prepare([*words, f"output.dir={folder / 'deployed'}"], 2)
    assert request.config.rounds == one["rounds"]
    assert request.config.method.rank == one["method.rank"]  # type: ignore[attr-defined]
    run = fedraclora.simulate(*words, "output.progress=false")
    assert run.summary["rounds"] == one["rounds"]


def test_no_test_sample_is_looked_at_before_the_end(tmp_path: Path) -> None:
    """With other test samples every trial and the frontier are the same, and the test is not."""
    x = torch.randn(150, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    clients = list(zip(x[:100].split(25), y[:100].split(25), strict=True))
    given_: dict[str, Any] = {
        "model": net,
        "data": clients,
        "rounds": 2,
        "output": {"progress": False},
    }
    given_["tune"] = {"runs": 3, "rungs": [], "sizes": [1], "test_seeds": [0]}
    one = fedraclora.tune(**given_, test=(x[100:], y[100:]), folder=tmp_path / "one")
    two = fedraclora.tune(**given_, test=(x[100:], 1 - y[100:]), folder=tmp_path / "two")
    curves = [[t.user_attrs["curve"] for t in ended(tmp_path / name)] for name in ("one", "two")]
    assert curves[0] == curves[1]
    assert one.test is not None
    assert two.test is not None
    assert one.test[0] == pytest.approx(1 - two.test[0])
    config = one.configs[1.0]
    words = ["--config-dir", str(tmp_path / "one"), "experiment=at_1MB", "output.progress=false"]
    again = fedraclora.simulate(*words, model=net, data=clients, test=(x[100:], y[100:]))
    assert again.summary["metrics"]["accuracy"] == one.test[0]  # type: ignore[index]
    assert fedraclora.simulate(config).summary["weights_digest"] == again.summary["weights_digest"]


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path) -> None:
    words = ["tune", *TASK, *SMALL, f"output.dir={tmp_path}", "tune.runs=6", "output.progress=true"]
    call = [sys.executable, "-m", "fedraclora.experiments.cli", *words]
    both = [subprocess.Popen(call, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(ended(tmp_path)) == 6 == len(trials(tmp_path))
    params = [tuple(sorted(trial.params.items())) for trial in ended(tmp_path)]
    assert len({*params}) == 6
    assert any("test accuracy" in text for text in told)


def test_a_run_whose_process_is_dead_is_tried_again(tmp_path: Path) -> None:
    tuned(tmp_path, "tune.runs=1", "tune.first=[]")
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'tune.db'}")
    cut = study.ask()
    cut.set_user_attr("process", 5)
    space_of().suggest(cut)
    with alone(tmp_path / "processes" / "5"):  # it lives: its run counts
        tuned(tmp_path, "tune.runs=2", "tune.first=[]")
    assert [trial.number for trial in ended(tmp_path, "RUNNING")] == [cut.number]
    assert len(ended(tmp_path)) == 1
    tuned(tmp_path, "tune.runs=2", "tune.first=[]")
    assert [trial.number for trial in ended(tmp_path, "FAIL")] == [cut.number]
    assert ended(tmp_path)[1].params == cut.params


@pytest.mark.slow
def test_a_run_that_was_killed_is_tried_again(tmp_path: Path) -> None:
    slow = "rounds=100000"
    words = ["tune", *TASK, *SMALL, slow, f"output.dir={tmp_path}", "tune.runs=1"]
    call = [sys.executable, "-m", "fedraclora.experiments.cli", *words, "tune.rungs=[]"]
    process = subprocess.Popen([*call, "tune.first=[]"])

    def begun() -> bool:
        with (tmp_path / "tune.lock").open("w") as file, contextlib.suppress(KeyError):
            fcntl.flock(file, fcntl.LOCK_EX)  # two that make the tables at once break each other
            return any("process" in trial.user_attrs for trial in ended(tmp_path, "RUNNING"))
        return False

    try:
        while not ((tmp_path / "processes").is_dir() and begun()):
            assert process.poll() is None
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (killed,) = ended(tmp_path, "RUNNING")
    plain = composed([*TASK, slow, f"output.dir={tmp_path}"])
    space = Space.of(plain, {key_of(word) for word in TASK}, settings(["tune.rungs=[]"], {}), set())
    assert space.methods
    made = search.Search(
        space, settings(["tune.runs=1"], {}), "accuracy", True, tmp_path, {}, print
    )
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'tune.db'}")
    made._take_up(study, 0)
    (failed,) = ended(tmp_path, "FAIL")
    assert failed.number == killed.number
    assert made._left(study) == (math.inf, math.inf)
    trial = study.ask()
    space.suggest(trial)
    assert trial.params == killed.params


def test_the_budget_in_bytes_is_kept_to_a_round(tmp_path: Path) -> None:
    tuned(tmp_path, "tune.runs=null", "tune.megabytes=0.02", "rounds=6")
    done = ended(tmp_path)
    spent = sum(trial.user_attrs["bytes"] for trial in done)
    curve = done[-1].user_attrs["curve"]
    assert 0 < spent <= 20_000 + (curve[-1]["bytes"] - curve[-2]["bytes"])
    assert spent > 10_000


@pytest.mark.slow
def test_a_run_that_diverges_is_a_bad_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = search.execute, [0]

    def breaking(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise_after = named["callbacks"][-1]
            raise_after.row(
                {"round": 0, "metrics": {"accuracy": 0.125}, "uplink_total": 0, "downlink_total": 0}
            )
            raise DivergenceError("round 1: not finite")
        return whole(*arguments, **named)

    monkeypatch.setattr(search, "execute", breaking)
    found = tuned(tmp_path, "tune.runs=2")
    one, two = ended(tmp_path)
    assert two.user_attrs["ended"] == "diverged"
    assert two.values == [0.125, one.values[1]]
    assert {*found.frontier["run"]} == {0}


@pytest.mark.slow  # it draws until two fit
def test_what_cannot_be_run_is_left_out_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A method that merges has no DoRA; what `never` has is not run either."""
    words = ["tune.method=[fed_rac_lora,ffa_lora]", "dora=true", "tune.runs=2", "tune.first=[]"]
    words += ["tune.never=[[wire.uplink=int8,wire.downlink=int8]]", "output.progress=true"]
    tuned(tmp_path, *words)
    text = capsys.readouterr().out
    assert {t.params["method"] for t in ended(tmp_path)} == {"ffa_lora"}
    refused = {
        t.user_attrs["refused"] for t in ended(tmp_path, "FAIL") if "refused" in t.user_attrs
    }
    assert refused
    assert all(text.count(f"left out: {reason}") == 1 for reason in refused)


@pytest.mark.slow
def test_an_interrupted_tuning_shows_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = search.execute, [0]

    def interrupted(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return whole(*arguments, **named)

    monkeypatch.setattr(search, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, "tune.runs=4")
    assert (tmp_path / "frontier.csv").is_file()
    (failed,) = ended(tmp_path, "FAIL")
    found = tuned(tmp_path, "tune.runs=3")
    assert [t.params for t in ended(tmp_path)][2] == failed.params
    assert found.test is not None


def space_of(*words: str, said: tuple[str, ...] = ()) -> Space:
    plain = composed([*TASK, *said])
    asked = {word.removeprefix("tune.").partition("=")[0] for word in words}
    return Space.of(plain, {key_of(word) for word in said}, settings(words, {}), asked)


def test_what_is_said_is_not_tuned_and_holds_for_each_method_that_has_it() -> None:
    words = ("method.rank=3", "method.alpha=6", "wire.uplink=int8", "local.lr=0.2")
    space = space_of("tune.method=[ffa_lora,fedavg]", said=words)
    assert {*space.tuned} == {"method.resample_every", "wire.downlink"}
    assert space.rates is None
    assert (space.methods["ffa_lora"]["rank"], space.methods["ffa_lora"]["alpha"]) == (3, 6)
    assert "rank" not in space.methods["fedavg"]


def test_numbers_in_few_bits_are_those_that_the_wire_has() -> None:
    space = space_of("tune.never=[]")
    assert {*space.tuned["wire.uplink"]} == {FULL, *ROUNDED}
    assert {*space_of().tuned["wire.uplink"]} == {FULL, *ROUNDED} - {"bfloat16"}


@pytest.mark.parametrize(("links", "wanted"), [("ffa_lora", False), ("fed_rac_lora", True)])
def test_links_are_tuned_where_a_method_has_some(links: str, wanted: bool) -> None:
    params = {"method": links, "method.rank": 3, "method.resample_every": 2, "local.lr": 0.1}
    params |= {"wire.uplink": "int8", "wire.downlink": "int8"}
    space = space_of("tune.rank=[3]", "tune.lr=[1e-3,1]")
    config = space.suggest(optuna.trial.FixedTrial(params))
    method = config["method"]
    assert isinstance(method, Mapping)
    assert method["rank"] == 3
    assert (method["resample_every"] == 2) == wanted
    assert np.isclose(config["local"]["lr"], 0.1)  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["tune.run=3"], "runs"),
        (["tune.runs=0"], r"tune\.runs is 0"),
        (["tune.runs=null"], "core_hours"),
        (["tune.lr=[1,0.1]"], r"tune\.lr is"),
        (["tune.rank=4"], r"tune\.rank is 4"),
        (["tune.rank=[0]"], r"tune\.rank has 0"),
        (["tune.method=[fedavgg]"], "fedavg"),
        (["tune.uplink=[int3]"], "int4"),
        (["tune.seeds=[0]"], r"test_seeds have both 0"),
        (["tune.rungs=[2]"], r"tune\.rungs has 2"),
        (["tune.more={local.epoch: [1]}"], "local.epochs"),
        (["tune.metric=f1"], "accuracy"),
        (["tune.lr=[0.1,1]", "local.lr=1"], "both said"),
        (["evaluate.split=test"], "set by tune"),
        (["evaluate.clients=all"], "other seeds"),
        (["tune.runs={"], "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    words: list[str], match: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=match):
        tuned(tmp_path / "none", *words)
    assert not (tmp_path / "none").exists()


def test_data_that_only_clients_have_are_refused(tmp_path: Path) -> None:
    for client in range(2):
        x = np.random.default_rng(client).normal(size=(20, 3))
        np.savez(tmp_path / f"{client}.npz", x=x, target=(x[:, 0] > 0).astype(int))
    words = ["data=own", f"data.samples={tmp_path}", "partition=auto", "clients=2", "pretrain=none"]
    with pytest.raises(ConfigError, match="no validation split"):
        command.tune_task(composed(words), {key_of(word) for word in words})


def test_without_optuna_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"fedraclora\[tune\]"):
        tuned(tmp_path)
