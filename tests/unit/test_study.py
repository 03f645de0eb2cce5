"""Studies: what is run, what is chosen, what is passed over, and one real run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pandas import Series

from fedraclora.commands import cli
from fedraclora.commands.study.entries import (
    Line,
    cost,
    dropped,
    finals,
    is_tuned,
    read_lines,
    score,
    shown_value,
    study_notes,
    tuned_by,
    tuned_value,
)
from fedraclora.commands.study.file import Study
from fedraclora.commands.study.run import refuse_failed, run_job, run_jobs, run_study
from fedraclora.commands.study.tables import _difference, budgets, results, write_results
from fedraclora.errors import ConfigError, DataError, FedRacLoraError
from fedraclora.run import packed

TEXT = """
experiment: null
metric: accuracy
grid: {key: local.lr, values: [0.1, 0.4], refine: [0.5]}
tune: {seeds: [7, 8], overrides: [data.validation=0.2, evaluate.split=validation]}
final: {seeds: [0, 1], overrides: []}
rows:
  ours: [method=fed_rac_lora, method.rank=4]
"""
SMALL = """
  small: [data=digits, pretrain=none, "model.hidden=[8]", clients=6, clients_per_round=3,
    rounds=2, output=study]
"""


def study(tmp_path: Path, text: str = TEXT) -> Study:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return Study.read(path)


def line(accuracy: float | None, **more: object) -> dict[str, Any]:
    metrics = {} if accuracy is None else {"accuracy": accuracy}
    point = {"round": 1, "metrics": metrics, "seconds": 0.5, "uplink_total": 8, "downlink_total": 9}
    found = {"metrics": metrics, "curve": [{**point, "round": 0}, point], "uplink_floats": 3}
    found |= {"config": {"method": {"name": "fedavg_lora", "rank": 2}}, "aggregation_error": 0.25}
    found |= {"uplink_total": 8, "downlink_total": 9, **more}
    return found | ({"diverged": "nan"} if accuracy is None else {})


def tuned(plan: Study, scores: dict[float, float | None]) -> dict[str, dict[str, Any]]:
    return {
        j.key: line(score) for v, score in scores.items() for j in plan.jobs("tune", "ours", [v])
    }


def test_jobs_carry_preset_row_phase_value_and_seed(tmp_path: Path) -> None:
    job = study(tmp_path).jobs("tune", "ours", [0.4])[1]
    assert job.overrides == (
        "method=fed_rac_lora",
        "method.rank=4",
        "data.validation=0.2",
        "evaluate.split=validation",
        "local.lr=0.4",
        "seed=8",
    )
    assert job.key == "tune|ours|0.4|8"


def test_words_of_the_command_line_join_every_job_and_the_text(tmp_path: Path) -> None:
    study(tmp_path)
    plan = Study.read(tmp_path / "a.yaml", ["partition.alpha=0.05"], "matthews")
    assert plan.metric == "matthews"
    for phase in ("tune", "final"):
        assert plan.jobs(phase, "ours", [0.1])[0].overrides[0] == "partition.alpha=0.05"
    (tmp_path / "b.yaml").write_text(plan.text)
    assert Study.read(tmp_path / "b.yaml").overrides == ["partition.alpha=0.05"]


def test_words_for_tuning_join_the_tuning_runs_alone_and_the_text(tmp_path: Path) -> None:
    study(tmp_path)
    plan = Study.read(tmp_path / "a.yaml", tuning=["rounds=9"])
    (tmp_path / "b.yaml").write_text(plan.text)
    for read in (plan, Study.read(tmp_path / "b.yaml")):
        assert read.jobs("tune", "ours", [0.1])[0].overrides[-3] == "rounds=9"
        assert "rounds=9" not in read.jobs("final", "ours", [0.1])[0].overrides
    untuned = TEXT.replace("tune:", "target: 1 #").replace("values: [0.1, 0.4]", "values: [0.1]")
    (tmp_path / "c.yaml").write_text(untuned)
    with pytest.raises(ConfigError, match=r"has no tune.*rounds=9"):
        Study.read(tmp_path / "c.yaml", tuning=["rounds=9"])


def test_a_row_may_scale_the_grid(tmp_path: Path) -> None:
    plan = study(tmp_path, TEXT.replace("refine: [0.5]", "scale: {full: 0.01}") + "  full: []\n")
    assert plan.values("ours") == [0.1, 0.4]
    assert plan.values("full") == [0.001, 0.004]
    with pytest.raises(ConfigError, match=r"row of grid.scale 'fool'"):
        study(tmp_path, TEXT.replace("refine: [0.5]", "scale: {fool: 0.01}"))


def test_the_best_of_the_grid_and_its_refinement_is_chosen(tmp_path: Path) -> None:
    plan = study(tmp_path)
    done = tuned(plan, {0.1: 0.5, 0.4: 0.7})
    assert not is_tuned(plan, "ours", done)
    done |= tuned(plan, {0.2: 0.8})
    assert is_tuned(plan, "ours", done)
    assert tuned_value(plan, "ours", done) == 0.2
    assert shown_value(plan, "ours", 0.2, done) == "0.2"


def test_a_value_that_tuning_did_not_part_from_another_is_marked(tmp_path: Path) -> None:
    plan = study(tmp_path)
    done = tuned(plan, {0.1: 0.7, 0.4: 0.7, 0.05: 0.6})
    value = tuned_value(plan, "ours", done)
    assert shown_value(plan, "ours", value, done) == "0.1 (tied with 0.4)"
    assert shown_value(plan, "ours", 0.4, done) == "0.4 (edge of the grid; tied with 0.1)"


def test_values_may_be_those_that_another_study_has_tuned(tmp_path: Path) -> None:
    other = study(tmp_path)
    (tmp_path / "study.yaml").write_text(other.text)

    def ran(scores: dict[float, float | None]) -> None:
        lines = [{"key": key, **line} for key, line in tuned(other, scores).items()]
        (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, lines)))

    ran({0.1: 0.5, 0.4: 0.7})
    with pytest.raises(ConfigError, match="has not tuned ours"):
        tuned_by(other, tmp_path)
    ran({0.1: 0.5, 0.4: 0.7, 0.2: 0.8})
    plan = tuned_by(other, tmp_path)
    assert plan.values("ours") == [0.2]
    assert not plan.jobs("tune", "ours", [0.2])
    assert plan.refined(0.2) == []
    assert tuned_value(plan, "ours", {}) == 0.2
    (tmp_path / "again.yaml").write_text(plan.text)
    assert Study.read(tmp_path / "again.yaml") == plan  # so that its tables can be made anew
    with pytest.raises(ConfigError, match=r"grid\.values .* full under fixed"):
        plan.changed(more={"full": []})
    with pytest.raises(ConfigError, match="has not tuned full"):
        tuned_by(study(tmp_path, TEXT + "  full: []\n"), tmp_path)


@pytest.mark.usefixtures("painted")
def test_a_value_that_diverged_in_a_final_run_is_passed_over(tmp_path: Path) -> None:
    plan = study(tmp_path)
    done = tuned(plan, {0.1: 0.5, 0.4: 0.7, 0.2: 0.8})
    done["final|ours|0.2|1"] = line(None)
    assert tuned_value(plan, "ours", done) == 0.4
    jobs = plan.jobs("final", "ours", [0.4])
    done |= {job.key: line(0.6 + 0.1 * job.seed, seed=job.seed) for job in jobs}
    (row,) = results(finals(plan, done), done)
    assert row["passed over"] == "0.2"
    assert row["accuracy"] == 0.65
    for found in done.values():
        found["cpu_seconds"] = 900.0
    write_results(plan, done, tmp_path, {})
    text = (tmp_path / "table.md").read_text()
    assert "| ours |" in text
    assert text.endswith("\n9 runs, tuning included, took 2.25 core-hours.\n")
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_values_may_be_chosen_by_the_loss(tmp_path: Path) -> None:
    plan = study(tmp_path, TEXT.replace("seeds: [7, 8]", "by: loss, seeds: [7, 8]"))
    done = tuned(plan, {0.1: 0.7, 0.4: 0.5, 0.05: 0.9})
    for key, found in done.items():
        found["metrics"]["loss"] = {"0.1": 0.3, "0.4": 0.4, "0.05": 0.35}[key.split("|")[2]]
    assert tuned_value(plan, "ours", done) == 0.1
    done[plan.jobs("tune", "ours", [0.1])[0].key] = line(None)  # of two seeds one diverged
    done |= tuned(plan, {0.2: 0.6})
    for job in plan.jobs("tune", "ours", [0.2]):
        done[job.key]["metrics"]["loss"] = 0.5
    assert tuned_value(plan, "ours", done) == 0.4


def test_clients_own_models_have_a_score_too_and_what_was_not_measured_is_named() -> None:
    own = {"metrics": {"personal_accuracy": 0.6}}
    assert score(own, "accuracy") == 0.6
    assert score({"metrics": {}}, "accuracy") == float("-inf")
    with pytest.raises(ConfigError, match=r"metric loss; .*personal_accuracy"):
        score(own, "loss")


def test_what_the_runs_cost_is_their_sum() -> None:
    done = {"a": line(0.5, cpu_seconds=1800.0), "b": line(None, cpu_seconds=5400.0)}
    assert cost(done) == "2 runs, tuning included, took 2.00 core-hours."
    assert "; 1 more did not count it." in cost(done | {"c": line(0.5)})
    assert cost({"c": line(0.5)}) == ""


def final(plan: Study, row: str, seed: int, up: int, scores: list[float]) -> dict[str, Any]:
    """A final run of a row at 0.1, measured at rounds 0, 1, ...; down takes thrice what up does."""
    curve = [
        {
            "round": t,
            "metrics": {"accuracy": score},
            "seconds": 1.0,
            "uplink_total": up * t,
            "downlink_total": 3 * up * t,
        }
        for t, score in enumerate(scores)
    ]
    last = {k: curve[-1][k] for k in ("metrics", "uplink_total", "downlink_total")}
    key = plan.jobs("final", row, [0.1])[seed].key
    return {key: line(scores[-1], **last) | {"curve": curve, "key": key, "seed": seed}}


def test_budgets_are_those_of_the_row_that_used_least(tmp_path: Path) -> None:
    text = TEXT.replace(", values: [0.1, 0.4], refine: [0.5]", ", values: [0.1]")
    plan = study(tmp_path, text + "  theirs: [method=fedavg_lora]\nreference: theirs\n")
    done = {
        job.key: line(0.5) for row in plan.rows for job in plan.jobs("tune", row, plan.values(row))
    }
    done |= final(plan, "ours", 0, 1_000_000, [0.1, 0.5, 0.8])
    done |= final(plan, "ours", 1, 1_000_000, [0.1, 0.3, 0.4])
    assert budgets(plan, finals(plan, done)) is None  # one row alone
    for seed in (0, 1):
        done |= final(plan, "theirs", seed, 4_000_000, [0.1, 0.6, 0.7 - 0.2 * seed])
    made = budgets(plan, finals(plan, done))
    assert made is not None
    assert made.header == (
        "method",
        "at equal local steps, ± deviation",
        "at 2 MB of uplink, ± deviation",
        "at 8 MB of traffic, ± deviation",
        "less theirs, ± standard error",
        "uplink to the final accuracy of theirs / its uplink, ± deviation",
        "traffic to the final accuracy of theirs / its traffic, ± deviation",
    )
    ours, theirs = made.cells
    same = "0.6000 ± 0.2828"
    # Seed by seed 0.8 - 0.7 and 0.4 - 0.5; 2 of the 8 MB of its run take one seed to that 0.7.
    assert ours == ("ours", same, same, same, "+0.0000 ± 0.1000", *["0.250 (1 of 2 runs)"] * 2)
    # The other run of the reference is as good at 4 of its 8 MB as at its end.
    own = "0.750 ± 0.354"
    none = "before its first evaluation"  # not 0.1, which is the untrained model's
    assert theirs == ("theirs", "0.6000 ± 0.1414", none, none, "", own, own)
    done |= final(plan, "theirs", 1, 2_000_000, [0.1, 0.6, 0.5])
    again = budgets(plan, finals(plan, done))
    assert again is not None
    assert again.cells[1][2] == "0.6000 (1 of 2 runs)"


def test_a_study_may_name_the_row_whose_bytes_are_the_budget(tmp_path: Path) -> None:
    text = TEXT.replace(", values: [0.1, 0.4], refine: [0.5]", ", values: [0.1]")
    text = text.replace("seeds: [0, 1]", "seeds: [0]")
    rows = "  theirs: [method=fedavg_lora]\n  tiny: [method=ffa_lora]\n"
    plan = study(tmp_path, text + rows + "budget: ours\n")
    done = {
        job.key: line(0.5) for row in plan.rows for job in plan.jobs("tune", row, plan.values(row))
    }
    done |= final(plan, "ours", 0, 1_000_000, [0.1, 0.5, 0.8])
    done |= final(plan, "theirs", 0, 2_000_000, [0.1, 0.6, 0.9])
    done |= final(plan, "tiny", 0, 1_000, [0.1, 0.2, 0.3])
    made = budgets(plan, finals(plan, done))
    assert made is not None
    assert [title.partition(",")[0] for title in made.header[2:]] == [
        "at 2 MB of uplink",
        "at 8 MB of traffic",
    ]
    assert [cells[2].split()[0] for cells in made.cells] == ["0.8000", "0.6000", "0.3000"]
    with pytest.raises(ConfigError, match="did you mean 'ours'"):
        study(tmp_path, TEXT + "budget: our\n")
    assert plan.changed(only=["theirs", "tiny"]).budget is None


def test_a_row_with_further_seeds_is_held_against_the_seeds_that_both_have(tmp_path: Path) -> None:
    text = TEXT.replace(", values: [0.1, 0.4], refine: [0.5]", ", values: [0.1]")
    text = text.replace("overrides: []", "overrides: [], more: {ours: [2]}")
    plan = study(tmp_path, text + "  theirs: [method=fedavg_lora]\nreference: theirs\n")
    assert [job.seed for job in plan.jobs("final", "ours", [0.1])] == [0, 1, 2]
    assert [job.seed for job in plan.jobs("final", "theirs", [0.1])] == [0, 1]
    assert [job.seed for job in plan.jobs("tune", "ours", [0.1])] == [7, 8]
    done = {
        job.key: line(0.5) for row in plan.rows for job in plan.jobs("tune", row, plan.values(row))
    }
    for seed in (0, 1):
        done |= final(plan, "theirs", seed, 4_000_000, [0.1, 0.6, 0.7 - 0.2 * seed])
        done |= final(plan, "ours", seed, 1_000_000, [0.1, 0.4, 0.8 - 0.4 * seed])
    assert budgets(plan, finals(plan, done)) is None  # the third seed is missing
    done |= final(plan, "ours", 2, 1_000_000, [0.1, 0.5, 0.9])
    made = budgets(plan, finals(plan, done))
    assert made is not None
    ours, _ = made.cells
    assert ours[1] == "0.7000 ± 0.2646"  # of 0.8, 0.4 and 0.9
    assert ours[4:] == ("+0.0000 ± 0.1000", *["0.250 (1 of 2 runs)"] * 2)
    wrong = {"{our: [2]}": "did you mean 'ours'", "{ours: 2}": "must be a list"}
    wrong["{ours: [1]}"] = "repeats the seed 1 for ours"
    for more, words in wrong.items():
        with pytest.raises(ConfigError, match=words):
            study(tmp_path, text.replace("{ours: [2]}", more))


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"key": "a"}) + "\n" + '{"key": "b", "met')
    assert list(read_lines(path)) == ["a"]


def test_a_run_is_recorded_with_config_and_revision(tmp_path: Path) -> None:
    plan = study(tmp_path, TEXT + SMALL)
    found = json.loads(json.dumps(run_job(plan.jobs("final", "small", [0.1])[0]), default=str))
    assert found["config"]["local"]["lr"] == 0.1
    assert "output" not in found["config"]
    assert found["versions"]["torch"]
    assert found["cpu_seconds"] > 0
    assert [p["round"] for p in found["curve"]] == [0, 1, 2]
    assert found["curve"][-1]["metrics"] == found["metrics"]


def test_a_run_that_nobody_measured_fails_its_row(tmp_path: Path) -> None:
    """It counted as one that diverged, the worst of all."""
    plan = study(
        tmp_path, TEXT + SMALL.replace("data=digits,", "data=digits, data.test_fraction=0,")
    )
    failed: dict[str, str] = {}
    (job,) = plan.jobs("final", "small", [0.1])[:1]
    assert run_jobs([job], {}, tmp_path / "runs.jsonl", 1, "accuracy", failed)
    assert "nobody measured" in failed["small"]
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_run_that_diverges_is_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = study(tmp_path, TEXT + SMALL)
    (job,) = plan.jobs("final", "small", [1e30])[:1]
    done: dict[str, Line] = {}
    assert run_jobs([job], done, tmp_path / "runs.jsonl", 1, "accuracy", {})
    found = done[job.key]
    said = capsys.readouterr().out
    assert all(text in said for text in ("1 of 1", "small", "seed 0", "diverged", "round 1"))
    assert said.count("\n") == 1
    assert "client 1" not in said  # which runs.jsonl has
    assert "training loss" in str(found["diverged"])
    assert found["metrics"] == {}
    assert float(str(found["cpu_seconds"])) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("metric: accuracy", "metrc: accuracy"), "did you mean 'metric'"),
        (("metric: accuracy\n", ""), "lacks the keys metric"),
        (("seeds: [7, 8]", "seeds: [7, 8], bye: loss"), "key of tune 'bye'"),
        (("seeds: [7, 8]", "seeds: 7"), "tune.seeds of .* must be a list"),
        (("seeds: [0, 1]", "seeds: []"), "final.seeds of .* empty"),
        (("seeds: [0, 1]", "seeds: [a]"), "final.seeds of .*whole numbers"),
        (("[0.1, 0.4]", "[fast]"), "grid.values of .*numbers"),
        (("rows:", "overrides: data=digits\nrows:"), "overrides of .* must be a list"),
        (("rows:", "target: high\nrows:"), "target of .*numbers"),
        (("seeds: [7, 8], ", ""), "the keys seeds"),
        (("rows:", "rows: [ours]\nonly:"), "rows of .* must be a mapping"),
        (("metric: accuracy", "metric: loss"), "which less is better"),
        (("experiment: null", "experiment: null\nreference: our"), "did you mean 'ours'"),
        (("seeds: [0, 1]", "seeds: [0, 1"), "is not a study"),
    ],
)
def test_a_study_that_is_not_whole_is_refused(
    tmp_path: Path, change: tuple[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        study(tmp_path, TEXT.replace(*change))


def test_final_runs_need_no_overrides(tmp_path: Path) -> None:
    assert study(tmp_path, UNTUNED.replace(", overrides: []", "")).jobs("final", "ours", [0.1])


def test_a_study_that_does_not_exist_ends_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run("study", [str(tmp_path / "none.yaml")]) == 1
    assert "there is no study" in capsys.readouterr().err


def test_runs_are_one_at_a_time_or_more(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(TEXT)
    assert cli.run("study", [str(tmp_path / "a.yaml"), "--jobs", "0"]) == 1
    assert "jobs=0" in capsys.readouterr().err


UNTUNED = """
experiment: null
metric: accuracy
grid: {key: local.lr, values: [0.1]}
final: {seeds: [0, 1], overrides: []}
rows: {ours: [], theirs: []}
reported: {ours: 0.7}
"""


def test_a_study_without_tuning_gives_all_rows_one_value(tmp_path: Path) -> None:
    plan = study(tmp_path, UNTUNED)
    assert plan.jobs("tune", "ours", [0.1]) == []
    best = {"round": 3, "metrics": {"accuracy": 0.9}}
    more = {"best": best, "rounds": 5}
    done = {j.key: line(0.8, **more, seed=j.seed) for j in plan.jobs("final", "ours", [0.1])}
    (row,) = results(finals(plan, done), done)
    assert (row["local.lr"], row["accuracy"]) == ("0.1", 0.8)
    assert (row["reported"], row["difference"]) == (0.7, "+0.1000")
    assert row["aggregation error"] == "0.25"
    assert (row["at the best round"], row["best round"], row["rounds"]) == (0.9, 3.0, 5.0)
    with pytest.raises(ConfigError, match=r"no tune.*grid\.values"):
        study(tmp_path, UNTUNED.replace("[0.1]", "[0.1, 0.2]"))
    with pytest.raises(ConfigError, match=r"row of reported 'us'"):
        study(tmp_path, UNTUNED.replace("{ours: 0.7}", "{us: 0.7}"))


@pytest.mark.slow
def test_some_rows_are_run_and_the_tables_show_all_that_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan, out = study(tmp_path, UNTUNED), tmp_path / "out"
    monkeypatch.setattr(
        "fedraclora.commands.study.run.run_job",
        lambda job: line(0.8) | vars(job) | {"key": job.key},
    )
    run_study(plan, out, rows=["theirs"])
    assert [job["row"] for job in read_lines(out / "runs.jsonl").values()] == ["theirs"] * 2
    written = (out / "table.md").read_text()
    assert "| ours |" not in written
    assert "Not run to the end, or diverged at every value: ours." in written
    packed.compress(out / "runs.jsonl")
    run_study(plan, out, rows=["ours"])
    assert [path.name for path in out.glob("runs*")] == ["runs.jsonl"]
    shown = (out / "table.md").read_text()
    assert "| ours |" in shown
    assert "| theirs |" in shown
    assert (out / "study.yaml").read_text() == plan.text
    with pytest.raises(ConfigError, match="did you mean 'ours'"):
        run_study(plan, out, rows=["our"])


def test_the_figure_keeps_the_reference_and_the_table_the_rounding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedraclora.commands.study.tables.DRAWN", 2)
    rows = "{worst: [], good: [], better: [], best: []}\nreference: worst"
    plan = study(tmp_path, UNTUNED.replace("{ours: [], theirs: []}\nreported: {ours: 0.7}", rows))
    scores = {"worst": 0.1, "good": 0.5, "better": 0.6, "best": 0.7}
    more: dict[str, dict[str, float]] = {"best": {"rounding_up": 0.25}}
    done = {
        j.key: line(score, seed=j.seed, **more.get(row, {}))
        for row, score in scores.items()
        for j in plan.jobs("final", row, [0.1])
    }
    drawn: list[list[str]] = []
    monkeypatch.setattr(
        "fedraclora.plots.comparison.compare_figure",
        lambda groups, *_, **__: drawn.append([*groups]),
    )
    write_results(plan, done, tmp_path, {})
    assert drawn == [["worst", "best"]]
    assert "the 1 best of 4 rows and the reference" in capsys.readouterr().out
    shown = [row.get("rounding error, up") for row in results(finals(plan, done), done)]
    assert shown == ["", "", "", 0.25]


TABLE = """
experiment: null
overrides: [data=table, data.file=mine.csv, data.label=y, data.client=who, rounds=1,
  "model.hidden=[3]", output=study]
metric: accuracy
grid: {key: local.lr, values: [0.1]}
final: {seeds: [0], overrides: []}
rows: {ours: [], theirs: [method=fedavg]}
"""


def write_table(path: Path, shift: int = 0) -> None:
    rows = [f"{i},{(i * i + shift) % 7},{'ab'[i % 2]},{i % 3}" for i in range(24)]
    path.write_text("\n".join(["x,z,y,who", *rows]) + "\n")


def test_a_study_does_not_go_on_with_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "mine.csv")
    plan = study(tmp_path, TABLE)
    run_study(plan, tmp_path / "out", rows=["ours"])
    write_table(tmp_path / "mine.csv", shift=1)
    with pytest.raises(DataError, match=r"final\|ours\|0.1\|0 .*data\.file"):
        run_study(plan, tmp_path / "out")
    write_table(tmp_path / "mine.csv")
    run_study(plan, tmp_path / "out")
    assert len(read_lines(tmp_path / "out" / "runs.jsonl")) == 2


def test_a_metric_that_is_not_measured_is_said_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "mine.csv")
    plan = study(tmp_path, TABLE.replace("metric: accuracy", "metric: pearson"))
    with pytest.raises(ConfigError, match="metrics are accuracy, loss"):
        run_study(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "runs.jsonl").exists()


ROWS = """
experiment: null
overrides: [data=table, data.file=mine.csv, data.label=y, data.client=who, rounds=1,
  "model.hidden=[3]", output=study]
metric: accuracy
grid: {key: local.lr, values: [0.1, 0.2]}
tune: {seeds: [7], overrides: [data.validation=0.25, evaluate.split=validation]}
final: {seeds: [0, 1], overrides: []}
rows:
  small: [method=fedavg_lora, method.rank=1]
  narrow: [method=fedavg_lora, method.rank=2]
"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("evaluate.split=validation", "evaluate.every=1"), "Add evaluate.split=valid"),
        (("rounds=1", "evaluate.split=validation, rounds=1"), "evaluated on eval"),
        (("seeds: [7]", "seeds: [7], by: exact_match"), "exact_match is not measured"),
        (
            (
                "seeds: [7], overrides: [",
                'seeds: [7], by: loss, overrides: ["data.metrics=[loss]", ',
            ),
            "accuracy is not measured",
        ),
        (
            ("narrow: [method=fedavg_lora", "narrow: [method=pool_rac_lora"),
            "2 dimensions of fc1.weight",
        ),
        (
            ("narrow: [method=fedavg_lora, method.rank=2", "narrow: [method=fed"),
            "row 'narrow': unk",
        ),
    ],
)
def test_every_row_is_checked_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "mine.csv")
    with pytest.raises(ConfigError, match=words):
        run_study(study(tmp_path, ROWS.replace(*change)), tmp_path / "out")
    assert not (tmp_path / "out" / "runs.jsonl").exists()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_row_that_fails_is_told_and_the_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "mine.csv")
    monkeypatch.setattr("fedraclora.commands.study.run.check_first_runs", lambda *_: None)
    plan = study(
        tmp_path, ROWS.replace("narrow: [method=fedavg_lora", "wide: [method=pool_rac_lora")
    )
    done, failed = run_study(plan, tmp_path / "out", workers)
    assert {found["row"] for found in done.values()} == {"small"}
    assert len(done) == 2 + 2
    assert "2 dimensions of fc1.weight" in failed["wide"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| small |" in text
    assert "Failed: tune|wide|0." in text  # of two processes either may be the first
    with pytest.raises(FedRacLoraError, match="1 rows failed"):
        refuse_failed(failed)
    refuse_failed({})


def test_the_values_of_a_study_tuned_on_its_test_set_are_not_taken(tmp_path: Path) -> None:
    other = study(tmp_path, TEXT.replace(", evaluate.split=validation", "").replace("[0.5]", "[]"))
    (tmp_path / "study.yaml").write_text(other.text)
    lines = [{"key": key, **line} for key, line in tuned(other, {0.1: 0.5, 0.4: 0.7}).items()]
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match=r"measured on evaluate\.split=test"):
        tuned_by(study(tmp_path), tmp_path)


def test_a_difference_over_one_seed_has_no_error() -> None:
    ours, theirs = (SimpleNamespace(scores=Series({0: score})) for score in (0.5, 0.4))
    assert _difference(ours, theirs) == "+0.1000 ± -"  # type: ignore[arg-type]


def test_rows_that_their_own_method_beats_where_all_are_tuned_get_no_final_runs(
    tmp_path: Path,
) -> None:
    text = TEXT.replace("seeds: [0, 1], overrides", "seeds: [0, 1], ranks: 1, overrides")
    rows = "  small: [method.rank=2]\n  dear: [method.rank=9]\n  theirs: [method=fedavg_lora]\n"
    text = text.replace("refine: [0.5]", "refine: []") + rows
    plan = study(tmp_path, text)
    found = {"ours": (0.8, 8), "small": (0.7, 4), "dear": (0.75, 16), "theirs": (0.6, 32)}
    done = {
        job.key: line(found[row][0], uplink_total=found[row][1], seed=job.seed)
        for row in plan.rows
        for job in plan.jobs("tune", row, plan.values(row))
    }
    assert dropped(plan, done) == ["dear"]  # theirs is of another method
    assert dropped(plan.changed(reference="dear"), done) == []
    notes = " ".join(study_notes(plan, [], done, {}))
    assert "as good in fewer bytes where all were tuned: dear." in notes
    assert "diverged at every value: ours, small, theirs." in notes
