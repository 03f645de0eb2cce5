"""Tuning: what is tried and kept, the frontier, and what is found runs by itself."""

from __future__ import annotations

import contextlib
import fcntl
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pandas import DataFrame

import fedraclora
from fedraclora.binding import PlainDict, section
from fedraclora.compose.overrides import composed, key_of
from fedraclora.compose.resume import with_changes
from fedraclora.config.build import build_task
from fedraclora.config.run_config import task_from_plain
from fedraclora.errors import CheckpointError, ConfigError, DivergenceError
from fedraclora.protocol.quantized import FULL, ROUNDED
from fedraclora.run.folder import locked_folder
from fedraclora.run.found_rate import FoundRate
from fedraclora.run.statistics import frontier, ranks
from fedraclora.tuning import rates, search, task
from fedraclora.tuning.rates import RATE_KEY, TIMES, RateRange
from fedraclora.tuning.result import (
    Point,
    TuningResult,
    lacking,
    rounds_of_trials,
    taken_within,
)
from fedraclora.tuning.space import Space, settings
from fedraclora.weights.files import flatten

TASK = ["data=digits", "data.labels=null", "pretrain=none", "model.hidden=[12]", "clients=4"]
TASK += ["clients_per_round=4", "rounds=2", "local.epochs=1", "output.progress=false"]
SMALL = ["tune.rungs=[0.5]", "tune.sizes=[1]", "tune.test_seeds=[0]"]


def tuned(folder: Path, *words: str) -> TuningResult:
    rest = [*TASK, f"output.dir={folder}", *(w for w in words if not w.startswith("tune."))]
    own = [*SMALL, *(word for word in words if word.startswith("tune."))]
    return task.tune_task(composed(rest), {key_of(word) for word in rest}, own)


class Fed:
    """Feeds runs of a tuning with rows, in place of training: what is measured, bytes, seconds.

    Args:
        curves: Of each run in turn, what it has after each round from 0 on: bytes and score.
        seconds: Of a round, on a clock of its own.
        breaks: What the runs raise after their rows, by number.
    """

    def __init__(
        self,
        curves: Sequence[Sequence[tuple[float, float]]],
        seconds: float = 0.0,
        breaks: Mapping[int, BaseException] | None = None,
    ) -> None:
        self.curves, self.seconds, self.breaks = list(curves), seconds, breaks or {}
        self.now, self.begun, self.told = 0.0, 0, list[str]()

    def run(self, plain: PlainDict, seed: int, watch: search.TrialLogger) -> None:
        curve, breaks = self.curves[self.begun], self.breaks.get(self.begun)
        self.begun += 1
        for round_, (size, score) in enumerate(curve):
            self.now += self.seconds if round_ else 0
            metrics: dict[str, object] = {"metrics": {"accuracy": score}}
            watch.row({"round": round_, "uplink_total": size, "downlink_total": 0, **metrics})
            if round_ < len(curve) - 1 and watch.ends([]):
                return
        if breaks is not None:
            raise breaks


Feeding = Callable[..., tuple[search.Search, optuna.Study]]


@pytest.fixture
def feeding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Feeding:
    """Give a search whose trials are in memory, and whose runs are fed."""

    def make(
        fed: Fed, *words: str, study: optuna.Study | None = None
    ) -> tuple[search.Search, optuna.Study]:
        monkeypatch.setattr(search.Search, "study", lambda _: trials)
        monkeypatch.setattr(search.Search, "execute", lambda _, *given: fed.run(*given))
        monkeypatch.setattr(search, "time", SimpleNamespace(process_time=lambda: fed.now))
        space = replace(space_of(), plain={**space_of().plain, "rounds": 4})
        config = settings(["tune.sizes=[1e6]", *words], {})
        aims = ["maximize"] * len(config.sizes)
        trials = study or optuna.create_study(directions=aims)
        return search.Search(
            space, config, "accuracy", True, 4, tmp_path, {}, fed.told.append
        ), trials

    return make


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{folder / 'tune.db'}")
    found: list[optuna.trial.FrozenTrial] = study.get_trials()
    return found


def ended(folder: Path, state: str = "COMPLETE") -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in trials(folder) if trial.state.name == state]


points = st.lists(st.tuples(st.integers(1, 9), st.integers(-3, 3)), max_size=12)


@given(points, st.booleans())
def test_the_frontier_is_what_no_other_point_beats(drawn: list[tuple[int, int]], up: bool) -> None:
    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        better = (a[1] >= b[1]) if up else (a[1] <= b[1])
        return a[0] <= b[0] and better and a != b

    wanted = {p for p in drawn if not any(beats(other, p) for other in drawn)}
    rounds = frontier(DataFrame(drawn, columns=["traffic", "value"]), higher=up)
    assert [*rounds.itertuples(index=False, name=None)] == sorted(wanted)
    signed = [(-size, score if up else -score) for size, score in drawn]
    rank = dict(zip(drawn, ranks(signed), strict=True))
    assert {p for p in drawn if rank[p] == 0} == wanted
    assert all(rank[a] < rank[b] for a in drawn for b in drawn if beats(a, b))


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], TuningResult]:
    """A tuning that went on with the same command: its folder, what it knew, what it found."""
    folder = tmp_path_factory.mktemp("tune") / "twice"
    sizes = "tune.sizes=[0.001,1]"
    tuned(folder, "tune.runs=3", sizes)
    known = [trial.params for trial in ended(folder)]
    return folder, known, tuned(folder, "tune.runs=4", sizes)


@pytest.mark.slow
def test_it_goes_on_with_the_same_command(
    twice: tuple[Path, list[Any], TuningResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, known, found = twice
    assert len(known) == 3
    assert [trial.params for trial in ended(folder)][:3] == known
    assert len(ended(folder)) == 4
    assert found.frontier["run"].isin([t.number for t in ended(folder)]).all()
    with monkeypatch.context() as patched:
        patched.setattr(search.Search, "execute", lambda *_: pytest.fail("it runs again"))
        again = tuned(folder, "tune.runs=4", "tune.sizes=[0.001,1]")
        assert again.test == found.test
        assert found.test
    assert {"tune.db", "tune.lock", "processes"} <= {path.name for path in folder.iterdir()}
    assert [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & 0o077] == []
    with pytest.raises(CheckpointError, match="rounds"):
        tuned(folder, "rounds=3")
    with pytest.raises(CheckpointError, match=r"method\.rank"):
        tuned(folder, "tune.rank=[3]")


@pytest.mark.slow
def test_the_frontier_is_that_of_what_was_measured(
    twice: tuple[Path, list[Any], TuningResult],
) -> None:
    folder, _, tuning = twice
    curves = [t.user_attrs["curve"] for t in ended(folder) if t.user_attrs["ended"] != "diverged"]
    all_ = {(p["traffic"], p["value"]) for curve in curves for p in curve}
    best = {p for p in all_ if not any(o[0] <= p[0] and o[1] >= p[1] and o != p for o in all_)}
    wanted = sorted(float(f"{size / 4e6:.4g}") for size, _ in best if size)
    assert tuning.frontier["MB a client"].tolist() == wanted
    assert tuning.frontier["accuracy"].is_monotonic_increasing


@pytest.mark.slow
def test_what_is_found_runs_by_its_name_alone(twice: tuple[Path, list[Any], TuningResult]) -> None:
    folder, _, found = twice
    words = ["--config-dir", str(folder), "experiment=at_1MB"]
    one, other = flatten(composed(words)), flatten(found.configs[1.0])
    differ = {key for key in {*one, *other} if one.get(key, ...) != other.get(key, ...)}
    assert {key.partition(".")[0] for key in differ} <= {"output"}
    assert one["evaluate.split"] == "test"
    assert one["data.validation"] == 0
    run = fedraclora.simulate(*words, "output.progress=false")
    assert run.summary["rounds"] == one["rounds"]


@pytest.mark.slow
def test_no_test_sample_is_looked_at_before_the_end(tmp_path: Path) -> None:
    """With other test samples every trial and the frontier are the same, and the test is not."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(150, 6, generator=draw)
    y = (x[:, 0] > 0).long()
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    clients = list(zip(x[:100].split(25), y[:100].split(25), strict=True))
    given_: dict[str, Any] = {
        "model": net,
        "data": clients,
        "rounds": 2,
        "output": {"progress": False},
    }
    given_["tune"] = {"runs": 2, "rungs": [], "sizes": [1], "test_seeds": [0]}
    one = fedraclora.tune(**given_, test=(x[100:], y[100:]), folder=tmp_path / "one")
    two = fedraclora.tune(**given_, test=(x[100:], 1 - y[100:]), folder=tmp_path / "two")
    curves = [[t.user_attrs["curve"] for t in ended(tmp_path / name)] for name in ("one", "two")]
    assert curves[0] == curves[1]
    assert one.test[1.0][0] == pytest.approx(1 - two.test[1.0][0])
    words = ["--config-dir", str(tmp_path / "one"), "experiment=at_1MB", "output.progress=false"]
    again = fedraclora.simulate(*words, model=net, data=clients, test=(x[100:], y[100:]))
    assert again.summary["metrics"]["accuracy"] == one.test[1.0][0]  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"unknown data .*simulate\(data=\.\.\.\)"):
        fedraclora.simulate(*words, clients=4)  # on other data it would train without a word
    again = fedraclora.simulate(one.configs[1.0])
    assert again.summary["metrics"]["accuracy"] == one.test[1.0][0]  # type: ignore[index]


@pytest.mark.long
def test_two_processes_share_the_work(tmp_path: Path) -> None:
    words = ["tune", *TASK, *SMALL, f"output.dir={tmp_path}", "tune.runs=6", "output.progress=true"]
    call = [sys.executable, "-m", "fedraclora.commands.cli", *words]
    both = [subprocess.Popen(call, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(ended(tmp_path)) == 6 == len(trials(tmp_path))
    params = [tuple(sorted(trial.params.items())) for trial in ended(tmp_path)]
    assert len({*params}) == 6
    assert any("test accuracy" in text for text in told)


@pytest.mark.long
def test_a_run_that_was_killed_is_tried_again(tmp_path: Path) -> None:
    slow = "rounds=100000"
    words = ["tune", *TASK, *SMALL, slow, f"output.dir={tmp_path}", "tune.runs=1"]
    call = [sys.executable, "-m", "fedraclora.commands.cli", *words, "tune.rungs=[]"]
    process = subprocess.Popen([*call, "tune.first=[]"])

    def begun() -> bool:
        with (tmp_path / "tune.lock").open("w") as file, contextlib.suppress(KeyError):
            fcntl.flock(file, fcntl.LOCK_EX)  # two that make the tables at once break each other
            return bool(ended(tmp_path, "RUNNING"))
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
    asked = settings(["tune.runs=1"], {})
    made = search.Search(space, asked, "accuracy", True, 4, tmp_path, {}, print)
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'tune.db'}")
    made._take_up(study)
    (failed,) = ended(tmp_path, "FAIL")
    assert failed.number == killed.number
    trial = study.ask()
    space.suggest(trial)
    assert trial.params == killed.params


def test_the_budget_in_bytes_is_kept_to_a_round(feeding: Feeding) -> None:
    """A run ends before a round that would exceed it, if that is as long as the one before."""
    curve = [(size, 0.5) for size in (0, 3e5, 6e5, 9e5, 12e5)]
    made, study = feeding(Fed([curve] * 9), "tune.runs=null", "tune.megabytes=2.1", "tune.rungs=[]")
    assert made.run()
    assert [trial.user_attrs["bytes"] for trial in study.trials] == [12e5, 9e5]
    assert [trial.user_attrs["ended"] for trial in study.trials] == ["", search.BUDGET]


def test_the_core_hours_end_the_run_and_the_tuning(feeding: Feeding) -> None:
    curve = [(size, 0.5) for size in (0, 1, 2, 3, 4)]
    fed = Fed([curve] * 9, seconds=600)  # a round; six of them are an hour
    made, study = feeding(fed, "tune.runs=null", "tune.core_hours=1", "tune.rungs=[]")
    assert made.run()
    assert [trial.user_attrs["core_seconds"] for trial in study.trials] == [2400, 1200]
    assert [len(trial.user_attrs["curve"]) for trial in study.trials] == [5, 3]
    assert study.trials[1].user_attrs["ended"] == search.BUDGET
    more, _ = feeding(fed, "tune.runs=null", "tune.core_hours=1.5", "tune.rungs=[]", study=study)
    assert more.run()
    assert [trial.user_attrs["core_seconds"] for trial in study.trials] == [2400, 1200, 1800]


def best_share(there: Sequence[tuple[float, float]], keep: float) -> bool:
    """The law of a rung: whether the last that got there is among the best of all, by fronts."""
    if len(there) < 4:
        return True
    left, better = [*there], 0
    while True:
        front = [
            (size, score)
            for size, score in left
            if not any(o != (size, score) and o[0] <= size and o[1] >= score for o in left)
        ]
        if there[-1] in front:
            return better < keep * len(there)
        better += len(front)
        left = [point for point in left if point not in front]


def obeys(feeding: Feeding, keep: float) -> bool:
    """Whether runs that get to a rung one after another go on exactly as the law says."""
    rng = np.random.default_rng(round(100 * keep))
    drawn = [(float(rng.choice((2, 4, 6))), float(rng.integers(-3, 4))) for _ in range(12)]
    fed = Fed([[(0.0, -9.0), *[point] * 4] for point in drawn])
    words = [f"tune.runs={len(drawn)}", "tune.rungs=[0.25]", f"tune.keep={keep}"]
    sizes = [size / 4e6 for size in (2, 4, 6, 99)]  # a client's; there are four
    made, study = feeding(fed, *words, f"tune.sizes={sizes}")
    made.run()
    wanted = [best_share(drawn[: k + 1], keep) for k in range(len(drawn))]
    assert not all(wanted)
    ended = [trial.user_attrs["ended"] for trial in study.trials]
    assert {*ended} <= {"", search.HALVED}
    return [why == "" for why in ended] == wanted


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.7])
def test_a_run_goes_on_exactly_when_it_is_among_the_best_at_a_rung(
    keep: float, feeding: Feeding
) -> None:
    assert obeys(feeding, keep)


@pytest.mark.parametrize(
    "defect", ["by the largest size", "by the least size", "worst first", "of few"]
)
def test_the_law_of_rungs_sees_a_defect(
    defect: str, feeding: Feeding, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(values: Sequence[Sequence[float]]) -> list[int]:
        places = {"by the largest size": -1, "by the least size": 0}
        if defect in places:
            order = sorted({-value[places[defect]] for value in values})
            return [order.index(-value[places[defect]]) for value in values]
        return [-rank for rank in ranks(values)]

    if defect == "of few":
        monkeypatch.setattr(search, "FEW", 2)
    else:
        monkeypatch.setattr(search, "ranks", wrong)
    assert not all(obeys(feeding, keep) for keep in (0.25, 0.5, 0.7))


def test_a_run_that_diverges_has_the_metric_of_the_untrained_model(feeding: Feeding) -> None:
    whole = [(0.0, 0.1), (5.0, 0.2), (10.0, 0.3), (15.0, 0.4), (20.0, 0.5)]
    lost = [(0.0, 0.125), (2.0, 0.3), (4.0, math.nan), (6.0, math.nan), (8.0, math.nan)]
    broken = {1: DivergenceError("round 1: not finite")}
    fed = Fed([whole, whole[:1], lost], breaks=broken)
    made, study = feeding(fed, "tune.runs=3", "tune.rungs=[]")
    made.run()
    ran = study.trials[:3]
    assert [t.user_attrs["ended"] for t in ran] == ["", *[search.DIVERGED] * 2]
    assert [t.values for t in ran] == [[0.5], [0.1], [0.125]]
    # What diverged is tried again at a quarter of its rate, for as long as that is tried at all.
    tried = [t.system_attrs["fixed_params"] for t in study.trials[3:]]
    assert tried == [{**ran[2].params, TIMES: ran[2].params[TIMES] / 4}]
    assert ran[1].params[TIMES] / 4 < RateRange.least
    assert {*rounds_of_trials(made, study)["run"]} == {0}
    assert "not finite" in fed.told[1]


def test_what_was_running_is_tried_again_after_an_interruption(feeding: Feeding) -> None:
    curve = [(float(size), 0.5) for size in range(5)]
    fed = Fed([curve] * 5, breaks={1: KeyboardInterrupt()})
    made, study = feeding(fed, "tune.runs=3")
    with pytest.raises(KeyboardInterrupt):
        made.run()
    cut = study.trials[1]
    assert made.run()
    assert [t.state.name for t in study.trials].count("COMPLETE") == 3
    assert study.trials[1].state.name == "FAIL"
    assert [t.params for t in study.trials[2:]].count(cut.params) == 1


@pytest.mark.parametrize("running", [True, False])
def test_an_interruption_tells_what_was_found_and_how_to_go_on(
    feeding: Feeding, *, running: bool
) -> None:
    """While a run is tried, and while what is taken is tested."""
    curve = [(float(size), 0.5) for size in range(5)]
    fed = Fed([curve], breaks={0: KeyboardInterrupt()} if running else {})
    made, _ = feeding(fed, "tune.runs=1")
    told = list[bool]()

    def found(*, over: bool) -> TuningResult:
        told.append(over)
        if over:
            raise KeyboardInterrupt
        return TuningResult(made.folder, None, {}, {})

    with pytest.raises(KeyboardInterrupt) as raised:
        task.ended(made, found)
    assert told == [not running]
    assert any("the same command" in note for note in raised.value.__notes__)


def test_a_run_whose_process_is_dead_is_tried_again(feeding: Feeding, tmp_path: Path) -> None:
    curve = [(float(size), 0.5) for size in range(5)]
    made, study = feeding(Fed([curve] * 5), "tune.runs=2")
    cut = study.ask()
    made.space.suggest(cut)
    with locked_folder(tmp_path / "processes" / str(cut.number)):  # it lives: its run counts
        assert not made.run()
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "COMPLETE"]
    assert made.run()
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[2].params == cut.params


@pytest.mark.long  # it draws until two fit
def test_what_cannot_be_run_is_left_out_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A method that merges has no DoRA; what `never` has is not run either."""
    words = ["tune.method=[fed_rac_lora,ffa_lora]", "dora=true", "tune.runs=2", "tune.first=[]"]
    words += [
        "tune.never=[[compression.uplink=int8,compression.downlink=int8]]",
        "output.progress=true",
    ]
    tuned(tmp_path, *words)
    text = capsys.readouterr().out
    assert {t.params["method"] for t in ended(tmp_path)} == {"ffa_lora"}
    refused = {
        t.user_attrs["refused"] for t in ended(tmp_path, "FAIL") if "refused" in t.user_attrs
    }
    assert refused
    assert all(text.count(f"left out: {reason}") == 1 for reason in refused)


def space_of(*words: str, said: tuple[str, ...] = ()) -> Space:
    plain = composed([*TASK, *said])
    asked = {word.removeprefix("tune.").partition("=")[0] for word in words}
    return Space.of(plain, {key_of(word) for word in said}, settings(words, {}), asked)


def test_what_is_said_is_not_tuned_and_holds_for_each_method_that_has_it() -> None:
    words = ("method.rank=3", "method.alpha=6", "compression.uplink=int8", "local.lr=0.2")
    space = space_of("tune.method=[ffa_lora,fedavg]", said=words)
    assert {*space.tuned} == {"method.merge_every", "compression.downlink"}
    assert space.rates is None
    assert (space.methods["ffa_lora"]["rank"], space.methods["ffa_lora"]["alpha"]) == (3, 6)
    assert "rank" not in space.methods["fedavg"]


def test_numbers_in_few_bits_are_those_that_the_wire_has() -> None:
    space = space_of("tune.never=[]")
    assert {*space.tuned["compression.uplink"]} == {FULL, *ROUNDED}
    assert {*space_of().tuned["compression.uplink"]} == {FULL, *ROUNDED} - {"bfloat16"}


@pytest.mark.parametrize(("links", "wanted"), [("ffa_lora", False), ("fed_rac_lora", True)])
def test_links_are_tuned_where_a_method_has_some(links: str, wanted: bool) -> None:
    params = {"method": links, "method.rank": 3, "method.merge_every": 2, RATE_KEY: 0.1}
    params |= {"compression.uplink": "int8", "compression.downlink": "int8"}
    space = space_of("tune.rank=[3]", "tune.lr=[1e-3,1]")
    config = space.suggest(optuna.trial.FixedTrial(params))
    method = config["method"]
    assert isinstance(method, Mapping)
    assert method["rank"] == 3
    assert (method["merge_every"] == 2) == wanted
    assert np.isclose(config["local"]["lr"], 0.1)  # type: ignore[index]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["tune.run=3"], "runs"),
        (["tune.runs=0"], r"tune\.runs=0"),
        (["tune.runs=null"], "core_hours"),
        (["tune.lr=[1,0.1]"], r"tune\.lr="),
        (["tune.rank=4"], r"tune\.rank=4"),
        (["tune.rank=[0]"], r"tune\.rank\[0\]=0"),
        (["tune.method=[fedavgg]"], "fedavg"),
        (["tune.uplink=[int3]"], "int4"),
        (["tune.seeds=[0]"], r"test_seeds both have 0"),
        (["tune.rungs=[2]"], r"tune\.rungs\[0\]=2"),
        (["tune.more={local.epoch: [1]}"], "local.epochs"),
        (["tune.metric=f1"], "accuracy"),
        (["tune.lr=[0.1,1]", "local.lr=1"], "both given"),
        (["evaluate.split=test"], "set by tune"),
        (["evaluate.clients=all"], "other seeds"),
        (["tune.runs={"], "cannot be read"),
        (["tune.sizes=[1,2,3,4,5]"], "one to four"),
        (["tune.sizes=0.1"], "a list of float"),
        (["compression.uplink=edn2"], "eden2"),
        (["local.clips=1"], "clip"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    words: list[str], match: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=match):
        tuned(tmp_path / "none", *words)
    assert not (tmp_path / "none").exists()


def test_the_folder_of_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").touch()
    with pytest.raises(ConfigError, match="holds a run"):
        tuned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.jsonl"]


def test_data_that_only_clients_have_are_refused(tmp_path: Path) -> None:
    for client in range(2):
        x = np.random.default_rng(client).normal(size=(20, 3))
        np.savez(tmp_path / f"{client}.npz", x=x, target=(x[:, 0] > 0).astype(int))
    words = ["data=own", f"data.samples={tmp_path}", "partition=auto", "clients=2", "pretrain=none"]
    with pytest.raises(ConfigError, match="no validation split"):
        task.tune_task(composed(words), {key_of(word) for word in words})


def test_without_optuna_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"'\.\[tune\]'"):
        tuned(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("said", [(), ("local.lr=auto",)])
def test_the_rate_is_tuned_around_that_of_the_rule_for_each_run(
    said: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune.runs=2", "tune.rank=[2,8]", "tune.method=[ffa_lora]", "method.alpha=4"]
    tuned(tmp_path, *said, *words, "tune.first=[{rank: 8}]", "output.progress=true")
    assert (8, 1.0) in {(t.params["method.rank"], t.params[TIMES]) for t in ended(tmp_path)}
    text = capsys.readouterr().out
    log = (tmp_path / "run.log").read_text()
    assert "times that of a run's method and rank" in log
    told = [line.partition(":")[0] for line in text.splitlines()]
    assert told.index("run 0") <= 8  # before it, no more than a few lines
    # SGD's rule goes with the square of rank / alpha.
    assert f"local.lr={1.1 * 4:.4g}" in text


def test_the_rate_of_a_preset_is_moved_to_the_rank_of_a_run(tmp_path: Path) -> None:
    plain = composed([*TASK, "method=ffa_lora", "local.lr=0.3", "method.rank=4", "method.alpha=4"])
    built = build_task(task_from_plain(plain))
    at = {r: with_changes(plain, {"method.rank": r}) for r in (2, 4, 8)}
    given_ = plain, built, {"ffa_lora": section(plain, "method")}
    moved = RateRange.for_task(*given_, auto=False)
    assert [moved.around(at[r]) for r in (4, 8)] == pytest.approx([0.3, 1.2], rel=0.02)
    ruled = RateRange.for_task(*given_, auto=True)
    assert ruled.around(at[4]) == pytest.approx(1.1, rel=0.02)
    clipped = with_changes(at[4], {"local.clip": 1.0, "local.clip_by": "layer"})
    assert ruled.around(clipped) == ruled.around(at[4])


@pytest.mark.slow
@pytest.mark.parametrize("words", [["tune.method=[fedavg]"], ["local=momentum"]])
def test_where_there_is_no_rule_the_rate_is_tuned_around_one_that_is_found(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(rates, "find_rate", lambda _: FoundRate(0.0123, "search"))
    tuned(tmp_path, *words, "tune.runs=2", "output.progress=true")
    text = capsys.readouterr().out
    assert all(f"local.lr={0.0123 * t.params[TIMES]:.4g}" in text for t in ended(tmp_path))


def test_the_rate_of_a_preset_is_that_of_all_where_there_is_no_rule() -> None:
    plain = composed([*TASK, "method=fedavg", "local.lr=0.3"])
    given_ = plain, build_task(task_from_plain(plain)), {"fedavg": section(plain, "method")}
    found = RateRange.for_task(*given_, auto=False)
    assert found.around(plain) == 0.3
    assert "for all" in found.description


def test_why_nothing_is_taken_at_a_size_is_said(feeding: Feeding) -> None:
    made, _ = feeding(Fed([]), "tune.sizes=[10]")
    size = made.sizes[10]
    assert "diverge" in lacking(made, 10, trials_of())
    assert lacking(made, 10, trials_of([(0, 0.1), (2 * size, 0.9)])) == "all need more"
    assert "untrained" in lacking(made, 10, trials_of([(0, 0.5), (size / 2, 0.3)]))


def trials_of(*curves: Sequence[tuple[float, float]]) -> DataFrame:
    """A frame of trials from traffic and value after each round."""
    rows = [Point(k, t, *p) for k, curve in enumerate(curves) for t, p in enumerate(curve)]
    return DataFrame(rows, columns=Point._fields)


def test_one_unlucky_round_does_not_decide() -> None:
    steady = [(k, 0.5 if k else 0.1) for k in range(21)]
    better = [(k, 0.7 - 0.4 * (k in {20, 8}) if k else 0.1) for k in range(21)]
    trials = trials_of(steady, better)
    taken = taken_within(20, trials, higher=True)
    assert taken is not None
    assert (taken.round, taken.run) == (20, 1)
    assert taken.value == pytest.approx(0.62)  # the mean of the last five
    early = taken_within(3, trials, higher=True)
    assert early == (1, 3, *better[3])  # which rise: the last one counts


def test_within_a_size_a_run_counts_at_its_last_round_there() -> None:
    lucky = [*enumerate((0.1, 0.9, 0.5, 0.6, 0.2))]
    steady = [(2 * k, value) for k, value in enumerate((0.1, 0.7, 0.8))]
    trials = trials_of(lucky, steady)
    taken = [taken_within(most, trials, higher=True) for most in (0.5, 1, 3, 4, 9)]
    at = [None if point is None else (point.run, point.round) for point in taken]
    assert at == [None, (0, 1), (1, 1), (1, 2), (1, 2)]
    flipped = trials.assign(value=-trials["value"])
    assert taken_within(3, flipped, higher=False) == (1, 1, 2, -0.7)
    assert taken_within(9, trials_of([lucky[0], (4, 0.1)]), higher=True) is None


def test_a_run_counts_at_each_size_and_ends_where_the_next_round_is_beyond_all(
    feeding: Feeding,
) -> None:
    curve = [(1e6 * size, 0.1 * size) for size in range(5)]  # of four clients
    made, study = feeding(Fed([curve]), "tune.runs=1", "tune.sizes=[0.7,0.2,0.5]")
    made.run()
    assert study.trials[0].values == pytest.approx([0.0, 0.2, 0.2])
    assert study.trials[0].user_attrs["ended"] == search.BEYOND
    assert [*rounds_of_trials(made, study)["round"]] == [0, 1, 2]


def test_a_run_under_a_schedule_counts_as_a_whole(feeding: Feeding) -> None:
    curve = [(1e6 * size, 0.1 * size) for size in range(5)]
    made, _ = feeding(Fed([]), "tune.sizes=[0.9,1]")
    made.space.plain["local"] = {**section(made.space.plain, "local"), "schedule": "cosine"}
    rounds = trials_of(curve)
    assert made.metric_by_size(rounds) == pytest.approx([0.0, 0.4])
    assert made.metric_by_size(rounds[:3]) == pytest.approx(
        [0.0, 0.2]
    )  # at the bytes of all rounds


def test_going_on_with_other_sizes_is_refused(twice: tuple[Path, list[Any], TuningResult]) -> None:
    with pytest.raises(CheckpointError, match="sizes"):
        tuned(twice[0], "tune.runs=9", "tune.sizes=[2]")
