"""The benchmark itself: its rows do the same work, its bounds bite, its tables are made."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedraclora.commands import cli
from fedraclora.errors import ConfigError
from fedraclora.experiments.bench import command, late
from fedraclora.experiments.bench.command import (
    BenchConfig,
    largest,
    largest_chunk,
    measure,
    parse,
    profile,
    run,
    timed,
)
from fedraclora.experiments.bench.launch import environment, interpreter, run_peer
from fedraclora.experiments.bench.rows import BUILDERS
from fedraclora.experiments.bench.table import (
    BOUNDS,
    Report,
    disagreements,
    judge_rows,
    side_by_side,
    table,
    tables,
)
from fedraclora.experiments.bench.timing import training_loss
from fedraclora.experiments.bench.usage import Laps
from fedraclora.experiments.bench.workloads import (
    PEERS,
    WORKLOADS,
    Case,
    Workload,
    network,
    texts,
    vectors,
)
from fedraclora.protocol.method import RoundInstructions
from fedraclora.training.cohort import CohortTrainer
from fedraclora.tree import Tree

TINY = Workload(
    "6 clients",
    6,
    2,
    partial(network, "mlp", 3, (7,), hidden=[5]),
    partial(vectors, 7, 3),
    "fc2",
    ("fedavg", "loop"),
    samples=8,
    batch=4,
)
SIZES = {
    "model_type": "llama",
    "tie_word_embeddings": True,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 1030,  # enough that losses are formed at labelled tokens alone
}
TEXTS = Workload(
    "3 clients",
    3,
    2,
    partial(network, "causal_lm", 1030, config=SIZES),
    partial(texts, 1030, 12, None),
    "lm_head",
    ("vectorized", "inline", "own", "peft", "checkpointing", "peft checkpointing"),
    rank=2,
    samples=4,
    batch=2,
    loss="next_token",
    apart=True,
)
CPU = torch.device("cpu")
ROWS: dict[str, dict[str, Any]] = {
    "vectorized": {"seconds": 0.01, "cpu_seconds": 0.01, "peak_bytes": 3e8},
    "central": {"seconds": 0.005, "cpu_seconds": 0.005, "peak_bytes": 3e8},
    "flower": {
        "seconds": 0.5,
        "cpu_seconds": 1.5,
        "peak_bytes": 2e9,
        "facts": {"versions": {"flwr": "1.42.0", "ray": "2.55.1"}},
    },
    "pfl": {
        "seconds": 0.1,
        "cpu_seconds": 0.1,
        "peak_bytes": 4e8,
        "facts": {"versions": {"pfl": "0.6.0"}},
    },
}


def weights_after(row: str, rounds: int, of: Workload = TINY) -> dict[str, torch.Tensor]:
    run = BUILDERS[row](Case(of, CPU))
    for _ in range(rounds):
        run.round(Laps(children=False))
    run.close()
    assert run.weights is not None
    return run.weights()


def plain_fedavg(rounds: int) -> dict[str, torch.Tensor]:
    """FedAvg written out: gradients of one client's batch at a time, in the order of the data."""
    task = TINY.task(CPU)
    samples, model = task.train.samples, task.model  # type: ignore[attr-defined]
    held = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(rounds):
        ends = []
        for client in range(6):
            own = {n: w.clone().requires_grad_() for n, w in held.items()}
            for first in range(8 * client, 8 * client + 8, 4):
                x, y = samples.inputs["x"][first : first + 4], samples.target[first : first + 4]
                out = torch.func.functional_call(model, own, (x,))
                loss = torch.nn.functional.cross_entropy(out, y)
                grads = torch.autograd.grad(loss, list(own.values()))
                own = {
                    n: (w - 0.1 * g).detach().requires_grad_()
                    for (n, w), g in zip(own.items(), grads, strict=True)
                }
            ends.append(own)
        held = {n: torch.stack([e[n].detach() for e in ends]).mean(dim=0) for n in held}
    return held


@pytest.mark.parametrize("row", ["fedavg", "loop"])
def test_rows_of_full_weights_are_fedavg(row: str) -> None:
    task, wanted = TINY.task(CPU), plain_fedavg(3)
    found = weights_after(row, 3)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    start = {n: p.detach() for n, p in task.model.named_parameters()}
    assert training_loss(task, found) == pytest.approx(training_loss(task, wanted), rel=1e-5)
    assert training_loss(task, found) < training_loss(task, start)


@pytest.mark.long
@pytest.mark.filterwarnings(  # Ray leaves /dev/null open
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_ray_rows_count_their_own_workers() -> None:
    names = ["ray idle", "ray x1", "ray x2"]
    found = timed(names, Case(replace(TINY, ray_chunk=3), CPU), 2, lambda _: 0.0)
    assert found["ray x2"]["peak_bytes"] > found["ray x1"]["peak_bytes"] > 0
    assert all(row["cpu_seconds"] > 0 for row in found.values())
    gc.collect()  # before the next test, for which a warning is an error


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
def test_language_rows_are_one_algorithm() -> None:
    """By hand on PEFT, vectorized, one after another, with checkpointing: the same weights."""
    start = dict(TEXTS.task(CPU).model.named_parameters())
    found = {row: weights_after(row, 2, TEXTS) for row in TEXTS.rows}
    for row, weights in found.items():
        for name, wanted in found["peft"].items():
            assert torch.allclose(weights[name], wanted, rtol=0, atol=1e-6), (row, name)
    trained = "model.layers.1.mlp.down_proj.weight"
    assert not torch.allclose(found["peft"][trained], start[trained], rtol=0, atol=1e-4)
    report = Report("llama", {"vectorized": ROWS["vectorized"]}, about={"tokens": 70})
    assert "7,000" in table(report).markdown()  # tokens over 0.01 s


@pytest.mark.long
def test_memory_of_a_row_is_that_of_a_process_of_its_own() -> None:
    # From a new process: in this one gradients were computed, which a fork does not survive.
    code = (
        "import test_bench as t; from fedraclora.experiments.bench.rows import peak_alone as peak"
    )
    call = [sys.executable, "-c", f"{code}; print(peak('central', t.TEXTS))"]
    done = subprocess.run(call, cwd=Path(__file__).parent, capture_output=True, check=True)
    assert 1e8 < int(done.stdout) < 4e9


def test_virtual_clients_are_asked_for_a_cohort() -> None:
    workload = replace(WORKLOADS["population"], clients=5000, asked=7)
    assert Case(workload, CPU).task.train.num_clients == 5000
    found = timed(["vectorized"], Case(workload, CPU), 1, lambda _: 0.0)
    assert found["vectorized"]["facts"]["chunk"] == 7.0


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_row_of_a_workload_is_somebodys(name: str) -> None:
    assert set(WORKLOADS[name].rows) <= {*BUILDERS, *PEERS}


def test_every_bound_names_rows_that_its_workload_has() -> None:
    for bound in BOUNDS:
        rows = WORKLOADS[bound.workload].rows
        assert bound.over in rows
        assert bound.under is None or bound.under in rows
        assert (bound.most is None) != (bound.least is None)


def test_all_rows_make_the_rounds_they_should() -> None:
    rows = ["vectorized", "central", "inline", "idle", "product"]
    found = timed(rows, Case(TINY, CPU), 2, lambda _: 0.0)
    flops = {name: row.get("facts", {}).get("flops") for name, row in found.items()}
    assert flops["product"] == 2 * 1024**3
    assert flops["vectorized"] == flops["inline"]
    assert flops["idle"] is None
    assert {row["rounds"] for row in found.values()} == {2}
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in found.values())


def test_a_report_is_read_back(tmp_path: Path) -> None:
    config = BenchConfig(size="A", rows="fedavg,loop,pfl", rounds=1, peers=str(tmp_path))
    report = measure("A", Case(TINY, CPU), config)
    assert set(report.rows) == {"fedavg", "loop"}
    report.missing["pfl"] = "not installed"
    report.write(tmp_path)
    again = Report.read(tmp_path / "A.json")
    assert again.rows.keys() == report.rows.keys()
    assert again.missing == report.missing
    assert again.about["threads"] == 1
    assert not disagreements(again.rows)


def test_bounds_are_kept_broken_or_open() -> None:
    verdict = judge_rows("A", ROWS)
    assert [line.split(" / ")[0] for line in verdict["kept"]] == ["A: flower"]
    assert [line.split(" / ")[0] for line in verdict["broken"]] == ["A: vectorized", "A: pfl"]
    assert "it is 10" in verdict["broken"][1]
    assert any("fedjax" in line for line in verdict["open"])
    most = judge_rows("B", {"vectorized": {"cpu_seconds": 1.2}, "central": {"cpu_seconds": 1.0}})
    assert any("at most 1.1" in line for line in most["broken"])


def test_a_peer_that_ends_elsewhere_is_seen() -> None:
    rows: dict[str, dict[str, object]] = {"fedavg": {"loss": 1.5}, "pfl": {"loss": 1.50001}}
    assert not disagreements(rows)
    rows["flower"] = {"loss": 1.51}
    assert "flower ended at training loss 1.51" in disagreements(rows)[0]
    rows["flower"] = {"loss": float("nan")}
    assert disagreements(rows)


def test_the_table_names_versions_and_ratios(tmp_path: Path) -> None:
    about = {"processor": "P", "cores": 2, "threads": 1, "versions": {"torch": "2"}, "git": "abc"}
    Report("A", ROWS, {}, about).write(tmp_path)
    made = tables(tmp_path)
    (row,) = [line for line in made.splitlines() if "Flower" in line]
    assert row.startswith("| full weights, Flower 1.42.0, Ray 2.55.1, 2 actors | 0.5 | 1.5 |")
    assert row.endswith("| 300 | 150 |")
    assert made.index("central") < made.index("`vectorized`") < made.index("pfl 0.6.0")
    assert "P, 2 cores; torch 2, 1 thread a process; revision abc." in made
    with pytest.raises(ConfigError, match="holds no figures"):
        tables(tmp_path / "nowhere")


def test_the_share_of_the_peak_counts_the_work_of_central(tmp_path: Path) -> None:
    rows = {
        "central": {**ROWS["central"], "cpu_seconds": 2.0, "facts": {"flops": 8e9}},
        "loop": {**ROWS["central"], "cpu_seconds": 4.0, "facts": {"flops": 16e9}},
        "product": {**ROWS["central"], "cpu_seconds": 0.5, "facts": {"flops": 4e9}},
    }
    Report("A", rows).write(tmp_path)
    made = tables(tmp_path).splitlines()
    assert [line.split("|")[-2].strip() for line in made if "| central" in line] == ["0.5"]
    assert [line.split("|")[-2].strip() for line in made if "loop" in line] == ["0.25"]
    assert "8 GFLOP/s" in made[-1]
    assert not [line for line in made[1:] if line.startswith("| one product")]


def test_the_table_of_a_gpu_gives_throughput_and_the_largest_chunk(tmp_path: Path) -> None:
    rows = {
        "vectorized": {**ROWS["vectorized"], "largest_chunk": 65536},
        "central": ROWS["central"],
    }
    Report("A", rows, {}, {"device": "cuda", "card": "Card 1"}).write(tmp_path)
    made = tables(tmp_path)
    assert "| **Fed-RAC-LoRA, `vectorized`** | 0.01 | 500,000 | 300 | 2 | 65,536 |" in made
    assert "Card 1; torch" in made


def test_a_gpu_is_judged_by_wall_time() -> None:
    rows = {"vectorized": {"seconds": 1.0, "cpu_seconds": 9.0}, "central": {"seconds": 1.0}}
    assert not judge_rows("B", rows, "cuda")["broken"]


@pytest.mark.parametrize("most", [0, 1, 2, 3, 100, 1000, 65536])
def test_the_largest_chunk_is_found_to_an_eighth(most: int) -> None:
    tried: list[int] = []

    def fits(clients: int) -> bool:
        tried.append(clients)
        return clients <= most

    found = largest(fits, most=1 << 12)
    assert found <= most
    assert found >= min(most, 1 << 12) * 8 / 9 - 1
    assert len(tried) == len(set(tried))
    assert max(tried) <= 1 << 12


def test_a_chunk_that_starves_is_not_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    held = CohortTrainer.train

    def train(
        self: CohortTrainer,
        base: Tree,
        downlink: RoundInstructions,
        clients: torch.Tensor,
        **k: Any,
    ) -> Any:
        if len(clients) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return held(self, base, downlink, clients, **k)

    monkeypatch.setattr(CohortTrainer, "train", train)
    assert 18 <= largest_chunk(Case(TINY, CPU), "float32") <= 20
    assert 18 <= largest_chunk(Case(TINY, CPU), "bf16-mixed") <= 20


def test_stored_results_make_tables_and_agree() -> None:
    folder = Path(__file__).parents[2] / "experiments" / "results" / "bench"
    for path in sorted(folder.glob("*.json")):
        report = Report.read(path)
        assert path.stem == report.workload
        assert not disagreements(report.rows), path.name
        assert f"{report.workload}: {WORKLOADS[report.workload].what}" in tables(folder)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sise=A", "size"),
        ("size=D", "unknown size 'D'"),
        ("rows=vectorizd", "did you mean 'vectorized'"),
        ("rounds=0", "1 or more"),
        ("device=tpu", "device .tpu."),
        ("size", "key=value"),
    ],
)
def test_bad_words_are_named(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse([word])


def test_the_command_prints_a_stored_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Report("A", ROWS, {}, {}).write(tmp_path)
    assert run(parse([f"table={tmp_path}"])) == 0
    assert "| **Fed-RAC-LoRA, `vectorized`** |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "loss", "status", "said"),
    [
        (["check=true"], 1.5, 1, "at least 15 wanted"),
        ([], 1.5, 0, ""),
        ([], 1.6, 1, "at training loss 1.6"),
    ],
)
def test_a_broken_bound_and_other_work_end_with_a_status(
    words: list[str],
    loss: float,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {"fedavg": {**ROWS["vectorized"], "loss": 1.5}, **ROWS}
    rows["pfl"] = {**rows["pfl"], "loss": loss}
    report = Report("A", rows, {"fedlab": "not installed"}, {"device": "cpu"})
    monkeypatch.setattr(command, "measure", lambda *_: report)
    assert run(parse(["size=A", *words])) == status
    found = capsys.readouterr()
    assert said in found.err
    assert bool(found.err) == bool(status)
    assert "missing: fedlab: not installed" in found.out
    assert ("kept: A: flower / vectorized" in found.out) == ("check=true" in words)
    assert "open: A: fedjax / vectorized" in found.out or not words


@pytest.mark.long
def test_several_workloads_run_in_a_process_each(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["size=A,C", "rows=idle", "rounds=1", f"out={tmp_path}"]
    assert parse(parse(words).words) == parse(words)
    assert run(parse(words)) == 0
    assert Report.read(tmp_path / "A.json").rows.keys() == {"idle"}
    assert Report.read(tmp_path / "C.json").rows.keys() == {"idle"}
    assert "1,000 clients" in capfd.readouterr().out


@pytest.mark.parametrize("text", ["", "{}", '{"workload": "A", "rows": {}}', "[]"])
def test_a_file_that_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "A.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="figures of the benchmark"):
        Report.read(path)
    with pytest.raises(ConfigError, match="figures of the benchmark"):
        Report.read(tmp_path / "B.json")


def test_rows_of_several_workloads_stand_side_by_side(tmp_path: Path) -> None:
    Report("A", ROWS, {}, {}).write(tmp_path)
    slower = ROWS | {"central": {**ROWS["central"], "cpu_seconds": 0.01}}
    Report("C", slower, {}, {}).write(tmp_path)
    made = side_by_side(tmp_path, ["A", "C"], ["vectorized", "flower"])
    assert "| CPU s / central | 100 clients, MLP 64-128-10 | 1,000 clients, MLP" in made
    assert "| full weights, Flower 1.42.0, Ray 2.55.1, 2 actors | 300 | 150 |" in made
    with pytest.raises(ConfigError, match="row of workload A"):
        side_by_side(tmp_path, ["A"], ["nothing"])


def test_bad_words_end_with_a_status_and_help_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run("bench", ["size=Z"]) == 1
    assert "error: " in capsys.readouterr().err
    assert cli.run("bench", ["--help"]) == 0
    assert "profile=true" in capsys.readouterr().out


def test_every_station_of_the_profile_is_passed() -> None:
    found = profile(Case(TINY, CPU), seconds=0.0)
    assert [name for name, _, calls in found.stations if calls == 0] == []
    assert found.free > 0
    assert "backward" in str(found)


@pytest.mark.slow
def test_laps_count_the_work_of_children() -> None:
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    laps = Laps()
    laps.begin()
    subprocess.run([sys.executable, "-c", burn], check=True)
    laps.end()
    assert laps.cpu[0] > 0.15
    alone = Laps(children=False)
    alone.begin()
    time.sleep(0)
    alone.end()
    assert alone.cpu[0] < 0.15


@pytest.fixture
def peer_python(tmp_path: Path) -> Path:
    """An environment whose Python runs a peer that does nothing but answer."""
    home = tmp_path / "stub"
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/peer.py"\n')
    script.chmod(0o755)
    (home / ".installed").touch()
    return script


@pytest.mark.long
def test_a_peer_gets_the_work_and_gives_its_weights(tmp_path: Path, peer_python: Path) -> None:
    (tmp_path / "peer.py").write_text(
        "import sys\n"
        "sys.path.insert(0, __import__('os').environ['PYTHONPATH'])\n"
        "from fedraclora.experiments.bench.peers.work import Work\n"
        "from fedraclora.experiments.bench.usage import Laps\n"
        "work, laps = Work(), Laps()\n"
        "assert work.x.shape == (6, 8, 7) and work.y.shape == (6, 8)\n"
        "assert (work.rounds, work.batch, work.lr) == (3, 4, 0.1)\n"
        "for _ in range(work.rounds):\n"
        "    laps.begin(); laps.end()\n"
        "work.report(laps, work.started().state_dict(), 'numpy')\n"
    )
    assert interpreter(tmp_path, "stub") == peer_python
    task = TINY.task(CPU)
    found, weights = run_peer("stub", peer_python, TINY, task, 3, 1)
    assert len(found["wall"]) == len(found["cpu"]) == 3
    assert found["versions"] == {"numpy": np.__version__}
    assert found["peak"] > 0
    start = dict(task.model.named_parameters())
    for name, value in weights.items():
        torch.testing.assert_close(value, start[name].detach(), rtol=0, atol=0)


def test_a_peer_that_fails_says_why(tmp_path: Path, peer_python: Path) -> None:
    (tmp_path / "peer.py").write_text("raise SystemExit('no such library')")
    with pytest.raises(ConfigError, match=r"peer stub .*status 1:\n.*library"):
        run_peer("stub", peer_python, TINY, TINY.task(CPU), 2, 1)
    assert interpreter(tmp_path, "absent") is None


def test_peers_that_are_not_there_or_fail_are_missing(tmp_path: Path, peer_python: Path) -> None:
    peer_python.parents[1].rename(tmp_path / "pfl")
    (tmp_path / "peer.py").write_text("raise SystemExit('no such library')")
    config = BenchConfig(size="A", rows="fedavg,pfl,fedlab", rounds=1, peers=str(tmp_path))
    workload = replace(TINY, rows=("fedavg", "pfl", "fedlab"))
    report = measure("A", Case(workload, CPU), config)
    assert report.rows.keys() == {"fedavg"}
    assert report.missing.keys() == {"pfl", "fedlab"}
    assert report.missing["fedlab"] == "not installed; `make bench-peers` installs the peers"
    assert "peer pfl ended with status 1:\nno such library" in report.missing["pfl"]


def test_peers_see_this_checkout_and_send_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "elsewhere")
    seen = environment(tmp_path / "work.json", 1)
    assert "PYTHONHOME" not in seen
    assert seen["PYTHONPATH"] == os.fspath(Path(__file__).parents[2])
    assert seen["FLWR_TELEMETRY_ENABLED"] == seen["RAY_USAGE_STATS_ENABLED"] == "0"


def test_workloads_fix_their_data() -> None:
    first, again = TINY.task(CPU), replace(TINY).task(CPU)
    a, b = first.train.samples, again.train.samples  # type: ignore[attr-defined]
    assert torch.equal(a.inputs["x"], b.inputs["x"])
    assert torch.equal(a.target, b.target)
    means = a.inputs["x"].reshape(6, 8, 7).mean(dim=1)
    assert means.std(dim=0).mean() > 1.5 * 8**-0.5 * 0.9  # shifted by client: not iid


def test_a_row_stands_late_in_a_run_and_counts_what_a_round_leaves() -> None:
    """Each link has 4 x (5 + 3) numbers, which two that were missed cost less than the weights."""
    run, laps = late.late(Case(replace(TINY, rank=1), CPU), 50, 6, 20), Laps(children=False)
    run.round(laps)
    first = dict(run.facts)
    run.round(laps)
    run.close()
    assert len(laps.cpu) == len(laps.wall) == 2
    assert 0 < first["catchup"] <= 6 * 4 * (7 * 5 + 5 * 3)
    assert first["disk"] > run.facts["disk"] > 0  # of the initial weights each round has less
    assert run.facts["checkpoint"] > 0


def test_rounds_late_in_a_run_are_a_line_for_each_size() -> None:
    facts = {"disk": 2000.0, "checkpoint": 5e4, "catchup": 3e6}
    rows = {
        late.named("1M/1k", round_): {
            "cpu_seconds": each,
            "peak_bytes": 1e6 * round_,
            "facts": facts,
        }
        for round_, each in ((10, 0.01), (100, 0.011), (1000, 0.012))
    } | {late.named("1k/100", 10): {"cpu_seconds": 0.1, "peak_bytes": 1e6, "facts": facts}}
    (line,) = late.by_round(rows, "rounds")
    assert [*line.values()] == [
        *("1,000,000 clients, 1,000 a round", "0.01", "0.011", "0.012", "1.2"),
        *("10", "1000", "2", "50", "3"),
    ]
    report = Report("rounds", rows, about={"device": "cpu"})
    assert "| 1,000,000 clients, 1,000 a round | 0.01 |" in table(report).markdown()


def test_workloads_with_rows_in_processes_of_their_own_can_be_sent_there() -> None:
    assert all(pickle.dumps(each) for each in WORKLOADS.values() if each.apart)
