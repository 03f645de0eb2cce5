"""The frontier over several studies of a task: shares of the traffic, winners, figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedraclora.commands.study.file import Study
from fedraclora.errors import ConfigError
from fedraclora.experiments.frontier import (
    Task,
    draw_shares,
    draw_task,
    has_run,
    shares,
    summary,
    winners,
)
from fedraclora.run.statistics import last

TEXT = """
experiment: null
metric: accuracy
grid: {key: local.lr, values: [0.1]}
final: {seeds: [0, 1], overrides: []}
rows:
"""
METHODS = {"ours": "fed_rac_lora", "theirs": "fedavg_lora", "few": "fedavg_lora", "ffa": "ffa_lora"}


def write_study(
    folder: Path,
    rows: dict[str, tuple[float, list[float]]],
    *,
    seeds: Sequence[int] = (0, 1),
    **config: object,
) -> dict[str, Any]:
    """Write a study whose rows send so many MB a round, up as down, and score so."""
    text = TEXT.replace("[0, 1]", f"{[*seeds]}") + "".join(
        f"  {row}: [method={METHODS[row]}]\n" for row in rows
    )
    folder.mkdir()
    (folder / "study.yaml").write_text(text)
    plan = Study.read(folder / "study.yaml")
    lines = []
    for row, (megabytes, scores) in rows.items():
        for job in plan.jobs("final", row, [0.1]):
            sent = [
                dict.fromkeys(("uplink_total", "downlink_total"), 500000.0 * megabytes * t)
                for t in range(9)
            ]
            curve = [
                {"round": t, "metrics": {"accuracy": score + job.seed / 50}, **sent[t]}
                for t, score in enumerate(scores)
            ]
            last = {
                "uplink_floats": 1,
                **curve[-1],
                "config": {"method": {"name": METHODS[row]}} | config,
            }
            lines.append({**vars(job), "key": job.key, **last, "curve": curve})
    (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"studies": [folder.name], "reference": "theirs"}


def both(tmp_path: Path) -> Task:
    told = write_study(tmp_path / "a", {"theirs": (10, [0.1, 0.4, 0.5])}, clients=4)
    write_study(
        tmp_path / "b",
        {"ours": (1, [0.6, 0.2, 0.6]), "few": (2, [0.1, 0.3, 0.5]), "ffa": (1, [0.1, 0.2, 0.3])},
        clients=4,
        later=1,  # a key that runs of the other study lack
    )
    return Task.read("digits", {**told, "studies": ["a", "b"]}, tmp_path)


def test_a_share_is_what_is_sent_until_the_final_metric_of_the_reference(tmp_path: Path) -> None:
    record = shares(both(tmp_path))
    assert record["its MB"] == "20"
    assert (record["ours"], record["ours, %"]) == ("ours", "10")  # not 0, where it is untrained
    assert record["ours, points there"] == "+10.0 ± 0.0"
    assert (record["best rival"], record["best rival, %"]) == ("few", "20")
    assert record["ours / rival"] == "0.50"
    assert record["FedAvg-LoRA, float32"] == "0.510"


def test_a_row_of_fewer_seeds_is_held_against_the_same_runs(tmp_path: Path) -> None:
    told = write_study(tmp_path / "a", {"theirs": (10, [0.1, 0.4, 0.5])}, clients=4)
    write_study(tmp_path / "b", {"ours": (1, [0.1, 0.5])}, seeds=[1], clients=4)
    task = Task.read("digits", {**told, "studies": ["a", "b"]}, tmp_path)
    assert last(task.curves)["value"]["ours"] == pytest.approx(task.target)  # on seed 1 both 0.52
    write_study(tmp_path / "c", {"few": (1, [0.1, 0.5])}, seeds=[7], clients=4)
    with pytest.raises(ConfigError, match="no seed"):
        _ = Task.read("digits", {**told, "studies": ["a", "c"]}, tmp_path).curves


def test_winners_are_the_best_of_each_side_within_a_share_of_the_traffic(tmp_path: Path) -> None:
    found = {record["traffic"]: record for record in winners(both(tmp_path))}
    assert found["2 %"]["ours"] == found["2 %"]["best rival"] == "all need more"
    assert found["5 %"]["ours, metric"] == "0.210"
    assert found["5 %"]["best rival"] == "ffa"
    assert found["5 %"]["difference, points"] == "+0.0 ± 0.0"
    assert found["5 %"]["ours less FedAvg-LoRA, points"] == "-30.0 ± 0.0"  # of the reference's end
    assert found["2 %"]["ours less FedAvg-LoRA, points"] == found["2 %"]["seeds"] == ""
    assert (found["25 %"]["best rival"], found["25 %"]["difference, points"]) == (
        "few",
        "+10.0 ± 0.0",
    )


def test_the_seeds_of_a_difference_are_those_of_both_sides(tmp_path: Path) -> None:
    told = write_study(tmp_path / "a", {"theirs": (10, [0.1, 0.5])}, clients=4)
    write_study(tmp_path / "b", {"ours": (1, [0.1, 0.4])}, clients=4)
    write_study(tmp_path / "c", {"few": (1, [0.1, 0.3])}, seeds=[1], clients=4)
    task = Task.read("digits", {**told, "studies": ["a", "b", "c"]}, tmp_path)
    record = winners(task)[-1]
    assert record["seeds"] == "2 / 1 / 1"
    assert record["difference, points"].startswith("+10.0")
    assert summary(task)["seeds: ours / other / both"] == "2 / 1 / 1"


def test_rows_that_are_not_compared_alike_and_missing_references_are_refused(
    tmp_path: Path,
) -> None:
    told = write_study(tmp_path / "a", {"theirs": (10, [0.1, 0.5])}, clients=4)
    write_study(tmp_path / "b", {"ours": (1, [0.1, 0.5])}, clients=5)
    with pytest.raises(ConfigError, match=r"'ours' has clients=5.* 4"):
        Task.read("digits", {**told, "studies": ["a", "b"]}, tmp_path)
    with pytest.raises(ConfigError, match="'theirs'"):
        Task.read("digits", {**told, "studies": ["b"]}, tmp_path)
    with pytest.raises(ConfigError, match="'theirs'"):
        Task.read("digits", {**told, "studies": ["a", "a"]}, tmp_path)
    assert not has_run(["a"], tmp_path)
    (tmp_path / "a" / "table.md").touch()
    assert has_run(["a"], tmp_path)


@pytest.mark.usefixtures("painted")
def test_the_figures_are_drawn(tmp_path: Path) -> None:
    task = both(tmp_path)
    draw_task(task, tmp_path / "task.png")
    draw_shares([task], tmp_path / "shares.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("task", "shares"))
