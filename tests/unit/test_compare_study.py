"""``compare study=...``: methods run alike, resumed, ranked; what is not alike is refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from drawing import painting

from fedraclora.commands import cli
from fedraclora.commands.study.entries import RowResult, entries, read_lines
from fedraclora.commands.study.file import Study, check_same
from fedraclora.commands.study.leaderboard import STUDIES, chosen, find, leaderboard
from fedraclora.commands.study.run import run_jobs
from fedraclora.errors import ConfigError
from fedraclora.strategies.methods import METHODS

TINY = """
experiment: null
metric: accuracy
target: 0.12
grid: {key: local.lr, values: [0.1, 0.4], refine: [0.5]}
tune:
  seeds: [7]
  overrides: [rounds=1, data.validation=0.2, evaluate.split=validation]
final: {seeds: [0, 1], overrides: []}
overrides: [data=digits, pretrain=none, "model.hidden=[8]", clients=6, clients_per_round=3,
  rounds=2, output=study, local.steps=2]
rows:
  fedavg_lora: [method=fedavg_lora, method.rank=2, method.alpha=3]
  fedkrso: [method=fedkrso, method.rank=2]
  fedsa_lora: [method=fedsa_lora, method.rank=2]
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny study, run by the command."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(TINY)
    words = [f"study={folder}/tiny.yaml", f"out={folder}/out", "local.batch_size=8"]
    with painting():
        assert cli.run("compare", words) == 0
    return folder


def lines(folder: Path) -> dict[str, dict[str, Any]]:
    return read_lines(folder / "out" / "runs.jsonl")


def records(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "out" / "leaderboard.csv").open() as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_every_row_is_tuned_alike_and_runs_the_same_seeds(ran: Path) -> None:
    done = lines(ran)
    for row in ("fedavg_lora", "fedkrso", "fedsa_lora"):
        mine = [line for line in done.values() if line["row"] == row]
        assert len([line for line in mine if line["phase"] == "tune"]) == 3
        finals = [line for line in mine if line["phase"] == "final"]
        assert sorted(line["seed"] for line in finals) == [0, 1]
        assert all(line["config"]["local"]["batch_size"] == 8 for line in finals)
        assert all(line["config"]["head"] == "lora" for line in finals)


def test_the_board_has_what_the_runs_say(ran: Path) -> None:
    done, board = lines(ran), records(ran)
    for row, record in board.items():
        finals = [x for x in done.values() if (x["phase"], x["row"]) == ("final", row)]
        key = "personal_accuracy" if row == "fedsa_lora" else "accuracy"
        scores = [x["metrics"][key] for x in finals]
        assert float(record["accuracy"]) == pytest.approx(sum(scores) / 2)
        assert float(record["std"]) == pytest.approx(abs(scores[0] - scores[1]) / math.sqrt(2))
        assert float(record["uplink"]) == finals[0]["uplink_total"]
        assert float(record["server_cpu_seconds"]) > 0
        assert float(record["client_bytes"]) > 0
    assert board["fedkrso"]["exact"] == "True"
    assert float(board["fedavg_lora"]["aggregation_error"]) > 0


def test_what_is_personal_is_marked_and_not_ranked(ran: Path) -> None:
    text = (ran / "out" / "leaderboard.md").read_text()
    assert "| fedavg_lora |" in text
    rows = [line for line in text.splitlines() if line.startswith("| fed")]
    assert rows[-1].startswith("| fedsa_lora ‡ |")
    for name in ("table.md", "budgets.md"):
        assert "| fedsa_lora (clients' own models) |" in (ran / "out" / name).read_text()
    for name in ("leaderboard.png", "compare.png"):
        assert (ran / "out" / name).stat().st_size > 10_000


def test_a_value_at_the_edge_of_its_grid_is_marked_in_every_table(
    ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"study={ran}/tiny.yaml", f"out={ran}/out", "local.batch_size=8", "table=true"]
    assert cli.run("compare", words) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith(f"written: {ran}/out/leaderboard.md, ")
    assert "budgets.md, compare.png" in printed
    marked = []
    for name in ("leaderboard", "table"):
        text = (ran / "out" / f"{name}.md").read_text()
        lines = [line for line in text.splitlines() if line.startswith("| fed")]
        marked.append({line.split()[1] for line in lines if "(edge of the grid)" in line})
    assert marked[0] == marked[1] != set()
    assert all(0 < float(record["local.lr"]) < 1 for record in records(ran).values())


def test_what_has_run_is_not_run_again(ran: Path) -> None:
    before = (ran / "out" / "runs.jsonl").read_bytes()
    words = [f"study={ran}/tiny.yaml", f"out={ran}/out", "local.batch_size=8"]
    assert cli.run("compare", words) == 0
    assert cli.run("compare", [*words, "table=true"]) == 0
    assert (ran / "out" / "runs.jsonl").read_bytes() == before


def test_results_of_other_settings_are_not_taken_for_these(
    ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"study={ran}/tiny.yaml", f"out={ran}/out", "local.batch_size=4"]
    assert cli.run("compare", words) == 1
    said = capsys.readouterr().err
    assert "local.batch_size=8" in said
    assert "nother folder" in said


def tiny(tmp_path: Path, text: str = TINY) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return path


def test_methods_choose_rows_and_add_what_has_none(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    said: dict[str, object] = {"methods": "ffa_lora, fedkrso", "target": "0.5", "metric": "f1"}
    study = chosen(path, said, ["seed=3"])
    assert study.rows == {
        "ffa_lora": ["method=ffa_lora"],
        "fedkrso": ["method=fedkrso", "method.rank=2"],
    }
    assert (study.target, study.metric) == (0.5, "f1")
    assert study.overrides[-2:] == ["local.steps=2", "seed=3"]
    assert Study.parse(study.text, path, {}).rows == study.rows
    with pytest.raises(ConfigError, match="did you mean 'fedkrso'"):
        chosen(path, {"methods": "fedkrsoo"}, [])


def test_a_row_of_another_task_is_refused_unless_the_study_is_about_it(tmp_path: Path) -> None:
    text = TINY + "  wider: [method=fedkrso, clients_per_round=4]\n"
    study = Study.read(tiny(tmp_path, text))
    with pytest.raises(ConfigError, match=r"'wider' has clients_per_round=4, .*'fedavg_lora' has"):
        check_same(study)
    check_same(Study.read(tiny(tmp_path, text + "varied: [clients_per_round]\n")))
    for word in ("local.batch_size=2", "head=full", "data.labels=[1]"):
        other = Study.read(tiny(tmp_path, TINY + f'  other: [method=fedkrso, "{word}"]\n'))
        with pytest.raises(ConfigError, match=word.partition("=")[0]):
            check_same(other)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study=leaderboard_mnst"], "did you mean 'leaderboard_mnist'"),
        (["study=fedslop_mnist", "jobs=0"], "jobs=0"),
        (["study=fedslop_mnist", "target=high"], "target='high'"),
        (["study=fedslop_mnist", "fedavg"], "form key=value"),
        (["study=fedslop_mnist", "table=true", "out={here}"], "whose final runs"),
        (["study=fedslop_mnist", "metod=fedavg", "out={here}"], "metod"),
    ],
)
def test_wrong_words_end_in_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("compare", [word.format(here=tmp_path) for word in words]) == 1
    assert said in capsys.readouterr().err


def plain(study: Study, row: str, scores: list[float | None], up: int) -> dict[str, dict[str, Any]]:
    """Final runs of a row at its first value, measured at rounds 0, 10 and 20."""
    value = study.values(row)[0]
    found = {}
    for job, last in zip(study.jobs("final", row, [value]), scores, strict=True):
        curve = [
            {
                "round": t,
                "metrics": {"accuracy": (last or 0) * t / 20},
                "uplink_total": up * t,
                "downlink_total": 2 * up * t,
            }
            for t in (0, 10, 20)
        ]
        line: dict[str, Any] = {"metrics": {} if last is None else curve[-1]["metrics"]}
        line |= {"key": job.key, "seed": job.seed, "curve": curve, "aggregation_error": 0.25}
        line |= {k: curve[-1][k] for k in ("uplink_total", "downlink_total")}
        line |= {"uplink_floats": 1, "config": {"method": {"name": row, "rank": 2}}}
        found[job.key] = line | ({"diverged": "nan"} if last is None else {})
    return found


def test_the_board_ranks_and_counts_what_reached_the_target(tmp_path: Path) -> None:
    text = TINY.replace("values: [0.1, 0.4], refine: [0.5]", "values: [0.1]")
    text = text[: text.index("tune:")] + text[text.index("final:") :]
    study = Study.read(tiny(tmp_path, text.replace("fedsa_lora", "ffa_lora"))).changed(target=0.4)
    done = plain(study, "fedavg_lora", [0.5, 0.9], 1_000_000)
    done |= plain(study, "fedkrso", [0.8, 0.3], 2_000_000)
    done |= plain(study, "ffa_lora", [0.3, None], 1_000_000)
    assert [entry.row for entry in entries(study, done)] == ["fedavg_lora", "fedkrso"]
    made = leaderboard(study, done)
    assert made is not None
    first, second = (dict(zip(made.header, cells, strict=True)) for cells in made.cells)
    assert first["accuracy, ± deviation"] == "0.7000 ± 0.2828"
    assert first["rounds to 0.4"] == "15"  # 20 of one seed, 10 of the other
    assert first["MB up to it"] == "15"
    assert first["MB both ways to it"] == "45"
    assert first["aggregation error"] == "0.25"
    assert second["rounds to 0.4"] == "10 (1 of 2 seeds)"
    assert second["aggregation error"] == "exact"
    assert second["client MB"] == "-"
    assert "Not run to the end, or diverged at every value: ffa_lora." in made.notes
    never = leaderboard(study.changed(target=0.95), done)
    assert never is not None
    assert never.cells[0][made.header.index("MB up to it")] == "-"


@pytest.mark.long  # and each study checks itself before its first run
@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_compares_its_rows_alike(path: Path) -> None:
    check_same(Study.read(path))


ALONE = {"lora", "asymmetric_lora", "cola", "relora", "rac_lora", "full"}  # of one client
BY_SGD = {"fedslop"}  # under AdamW it is fed_rac_lora
SCALARS = {"fedkseed", "decomfl", "ferret"}  # not run there


@pytest.mark.parametrize(
    ("board", "without"), [("mnist", ALONE), ("minilm", ALONE | BY_SGD | SCALARS)]
)
def test_a_leaderboard_has_every_federated_method(board: str, without: set[str]) -> None:
    study = Study.read(find(f"leaderboard_{board}"))
    named = {word.partition("=")[2] for row in study.rows.values() for word in row[:1]}
    assert set(METHODS) - without <= named


def test_a_run_of_other_settings_stops_before_anything_runs(tmp_path: Path) -> None:
    study = Study.read(tiny(tmp_path))
    job = study.jobs("final", "fedkrso", [0.1])[0]
    done = {job.key: {"overrides": [*job.overrides, "rounds=9"]}}
    with pytest.raises(ConfigError, match="rounds=9"):
        run_jobs([job], json.loads(json.dumps(done)), tmp_path / "runs.jsonl", 1, "accuracy", {})
    assert not (tmp_path / "runs.jsonl").exists()


def test_rounds_at_which_the_metric_was_not_measured_are_left_out_of_the_curves() -> None:
    measured: tuple[dict[str, float], ...] = (
        {"exact_match": 0.1, "loss": 2.0},
        {"loss": 1.0},
        {"exact_match": 0.6},
        {},
    )
    curve = [{"round": t, "metrics": found} for t, found in enumerate(measured)]
    lines = [{"curve": curve, "metrics": measured[2], "seed": 0}]
    study = Study.read(find("smollm2"))
    assert [*RowResult(study, "FFA-LoRA r=8", lines, 0.005).rounds["round"]] == [0, 2]


@pytest.mark.parametrize("name", ["study.yaml", "table.md"])
def test_a_study_overwrites_no_file_of_somebody_elses(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine: 1\n")
    assert cli.run("compare", [f"study={tmp_path}/tiny.yaml", f"out={tmp_path}/out"]) == 1
    assert name in capsys.readouterr().err
    assert [p.read_text() for p in (tmp_path / "out").iterdir()] == ["mine: 1\n"]
