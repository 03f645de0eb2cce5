"""`fedraclora report`: one file without outside links, read in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

import fedraclora
from fedraclora.commands import cli
from fedraclora.commands.report.figures import last_measured, lines_of, spread_figures
from fedraclora.commands.report.page import (
    ReportedRun,
    differences,
    labels_of,
    page_of,
    read_shown,
    results,
)
from fedraclora.errors import CheckpointError
from fedraclora.launch import stored_run
from tests.common import FIXED

WORDS = ("data=digits", "pretrain=none", "output.progress=false", "model.hidden=[7]")
WORDS += ("output.plots=false", "clients=6", "clients_per_round=3", "rounds=4")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fedraclora.RunResult]:
    root = tmp_path_factory.mktemp("runs")
    wires = {"fed_rac_lora": "float32", "fedavg_lora": "int8"}
    return {
        name: fedraclora.simulate(
            *WORDS, f"compression.uplink={bits}", folder=root / name, method=name, local={"lr": 0.2}
        )
        for name, bits in wires.items()
    }


LINES = lines_of([""], ["fedavg"])


def measured(shown: ReportedRun, folder: Path, shift: float) -> ReportedRun:
    """The same run, as if 30 clients had measured after rounds 0 and 4; written to a folder."""
    n = np.arange(30) * 7 % 30 + 1
    accuracy = 0.3 + n / 100 + shift
    low, median, high = np.quantile(accuracy, [0.1, 0.5, 0.9]).tolist()
    found = {
        "median": median,
        "p10": low,
        "p90": high,
        "worst10": float(np.sort(accuracy)[:3].mean()),
    }
    rows = [r | ({"clients": {"accuracy": found}} if r["round"] != 2 else {}) for r in shown.rows]
    columns = {"client": range(30), "samples": n, "when": "before", "accuracy": accuracy}
    each = [pd.DataFrame({"round": round_, **columns}) for round_ in (0, 4)]
    folder.mkdir()
    pd.concat(each).to_parquet(folder / "clients.parquet")
    return replace(shown, rows=rows, folder=folder)


@pytest.mark.slow
def test_the_spread_over_clients_is_drawn(
    runs: dict[str, fedraclora.RunResult], tmp_path: Path
) -> None:
    """Of sums alone, without the clients' own numbers, by round and no more."""
    assert runs["fed_rac_lora"].folder is not None
    shown = read_shown(runs["fed_rac_lora"].folder)
    assert spread_figures({"": (shown.folder, shown.rows)}, LINES) == {}
    run = measured(shown, tmp_path / "a", 0.0)
    assert [*spread_figures({"": (run.folder, run.rows)}, LINES)] == [
        "accuracy of the clients",
        "accuracy of each client, sorted",
        "accuracy of clients by their number of samples",
    ]
    assert [*spread_figures({"": (tmp_path, run.rows)}, LINES)] == ["accuracy of the clients"]
    frame = last_measured(run.folder, "accuracy")
    assert frame is not None
    assert (len(frame), {*frame["round"]}) == (30, {4})
    text = spread_figures({"": (run.folder, run.rows)}, LINES)[
        "accuracy of clients by their number of samples"
    ].to_json()
    assert "rank correlation 1.00" in text
    assert "Federated evaluation" in page_of([run])
    assert "Federated evaluation" not in page_of([shown])


def outside(text: str) -> list[str]:
    """What a page would fetch; the library's own text, which names addresses, left out."""
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    return re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?https?:[^"')\s]*""", own)


def test_a_report_of_one_run(runs: dict[str, fedraclora.RunResult], capsys: Any) -> None:
    run = runs["fed_rac_lora"]
    assert cli.run("report", [str(run.folder)]) == 0
    assert run.folder is not None
    text = (run.folder / "report.html").read_text()
    assert "written to" in capsys.readouterr().out
    assert outside(text) == []
    metrics: Any = run.summary["metrics"]
    assert f"{metrics['accuracy']:.4f}" in text
    assert str(run.summary["weights_digest"]) in text
    assert "method:\n  name: fed_rac_lora" in text


def test_runs_stand_side_by_side(runs: dict[str, fedraclora.RunResult], tmp_path: Path) -> None:
    folders = [run.folder for run in runs.values() if run.folder is not None]
    text = page_of([read_shown(folder) for folder in folders])
    assert "<code>method.name</code>" in text
    assert text.count('<section class="card">') == 8
    assert "aggregation error, as the method reports it" in text  # of fedavg_lora
    for name in runs:
        assert name in text
    assert "rounding error, up" in text  # of one of them
    # A run's own best round may have been better: what is compared is how they end.
    assert "the best of these runs at their ends" in text
    assert ", the best</span>" not in text
    assert "rounding error, down" not in text


def test_runs_of_one_method_are_told_apart_by_their_seeds(
    runs: dict[str, fedraclora.RunResult],
) -> None:
    folder, other = runs["fed_rac_lora"].folder, "another"
    assert folder is not None
    one = read_shown(folder)
    again = replace(one, config={**one.config, "seed": 7})
    assert labels_of([one, again]) == ["fed_rac_lora r=8, seed 0", "fed_rac_lora r=8, seed 7"]
    local = {**one.config["local"], "lr": 0.3}
    assert "lr=0.3" in labels_of([one, replace(one, config={**one.config, "local": local})])[1]
    assert labels_of([one, replace(one, folder=Path(other))])[1] == other


def test_the_best_of_several_runs_is_one_that_came_to_its_end(
    runs: dict[str, fedraclora.RunResult],
) -> None:
    shown = [read_shown(run.folder) for run in runs.values() if run.folder is not None]
    for row, value in zip(shown, (0.25, 0.75), strict=True):
        row.rows[-1]["metrics"]["accuracy"] = value
    assert [(value, best) for *_, value, best in results(["a", "b"], shown)] == [
        ("0.2500", False),
        ("0.7500", True),
    ]
    shown[1] = replace(shown[1], summary={})
    assert [best for *_, best in results(["a", "b"], shown)] == [True, False]
    assert [best for *_, best in results(["a"], shown[:1])] == [False]
    assert "not running" in page_of(shown)
    never = replace(shown[0], rows=[row | {"metrics": {}} for row in shown[0].rows])
    assert 'class="alone"' not in page_of([never])


def test_settings_that_differ_are_written_as_they_are_typed(
    runs: dict[str, fedraclora.RunResult],
) -> None:
    one, two = (read_shown(run.folder) for run in runs.values() if run.folder is not None)
    other = {key: value for key, value in two.config.items() if key != "stop"}
    first = replace(one, config={**one.config, "init_from": None})
    found = differences([first, replace(two, config=other | {"init_from": "a"})])
    assert found["init_from"] == ["null", "a"]
    assert found["stop.metric"] == ["loss", ""]


@pytest.mark.slow
def test_a_deployed_run_is_run_again_in_one_process(
    runs: dict[str, fedraclora.RunResult], tmp_path: Path
) -> None:
    run = runs["fed_rac_lora"]
    assert run.folder is not None
    shown = read_shown(run.folder)
    engine = {"name": "deploy", "chunk": 1, "threads": 1, "wait": 9.0, "folder": "~/there"}
    deployed = replace(shown, config={**shown.config, "engine": engine})
    again = fedraclora.simulate(yaml.safe_load(deployed.yaml))
    inline = fedraclora.simulate(
        *WORDS, "engine=inline", folder=tmp_path / "run", method="fed_rac_lora", local={"lr": 0.2}
    )  # whose bits a deployed run has
    assert again.summary["weights_digest"] == inline.summary["weights_digest"]
    assert "The run was deployed" in page_of([deployed])
    data = {"name": "own", "samples": None}
    text = page_of([replace(deployed, config={**deployed.config, "data": data})])
    assert "The samples are with the nodes" in text
    assert "assert run.summary" not in text
    assert "assert run.summary" not in page_of([replace(shown, summary={})])


def test_failures_and_generations_are_shown(
    runs: dict[str, fedraclora.RunResult], tmp_path: Path
) -> None:
    folder = runs["fed_rac_lora"].folder
    assert folder is not None
    shown = read_shown(folder)
    shown.rows[-1]["failures"] = [{"client": 3, "reason": "<b>no disk</b>"}]
    for row, share in zip(shown.rows[-2:], (0.25, 0.5), strict=True):
        row["metrics"] = {**row["metrics"], "exact_match": share}
    shown.rows[-1]["generations"] = [{"prompt": "2 + 2 =", "answer": "5", "wanted": "4"}]
    text = page_of([shown])
    assert "exact match of answers" in text
    assert "&lt;b&gt;no disk&lt;/b&gt;" in text
    assert "<b>no disk</b>" not in text
    assert '<td class="text">2 + 2 =</td><td class="text">5</td><td class="text">4</td>' in text


@pytest.mark.parametrize("words", [["nowhere"], ["a", "a"]])
def test_bad_folders_are_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run("report", words) == 1
    error = capsys.readouterr().err
    assert "nowhere holds no run" in error or "named twice" in error


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match="no rounds"):
        read_shown(tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "stopped.json"])
def test_a_damaged_file_is_named(
    name: str, runs: dict[str, fedraclora.RunResult], tmp_path: Path
) -> None:
    folder = runs["fed_rac_lora"].folder
    assert folder is not None
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / name).write_text("{")
    with pytest.raises(CheckpointError, match=name):
        read_shown(tmp_path / "run")


# ---- In a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_text_and_curves(
    width: int, scheme: str, browser: Any, runs: dict[str, fedraclora.RunResult], tmp_path: Path
) -> None:
    folders = [run.folder for run in runs.values() if run.folder is not None]
    page_file = tmp_path / "report.html"
    shown = [
        measured(read_shown(folder), tmp_path / folder.name, shift)
        for folder, shift in zip(folders, (0.0, 0.1), strict=True)
    ]
    page_file.write_text(page_of(shown), encoding="utf-8")
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page, wrong, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_function("document.querySelectorAll('.main-svg').length > 6")
    assert page.inner_text("h1") == "2 runs"
    value = page.locator(".results .best b")
    best = max(run.history["accuracy"].iloc[-1] for run in runs.values())
    assert value.inner_text() == f"{best:.4f}"
    assert value.evaluate("e => parseFloat(getComputedStyle(e).fontSize)") > 2 * 16
    lines = page.evaluate(
        "document.querySelector('.plotly-graph-div').data.map(d => [d.name, Array.from(d.y)])"
    )
    wanted = [run.history["accuracy"].tolist() for run in runs.values()]
    assert [values for _, values in lines] == wanted
    assert [name for name, _ in lines] == ["fed_rac_lora r=8", "fedavg_lora r=8"]
    names = page.evaluate(
        "Array.from(document.querySelectorAll('.plotly-graph-div')).slice(-3)"
        ".map(e => e._fullData.map(d => d.name + ' ' + (d.line || d.marker).color))"
    )
    assert [len(each) for each in names] == [8, 2, 4]  # two edges, median, worst tenth of each run
    assert len({name.rpartition(" ")[2] for name in names[0]}) == 2  # one colour for each run
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    wide = page.evaluate(
        "Array.from(document.querySelectorAll('.card')).every(c => "
        "c.querySelector('.plotly-graph-div').getBoundingClientRect().right "
        "<= c.getBoundingClientRect().right + 1)"
    )
    assert wide, "a curve is wider than its card"
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    context.close()


def test_a_run_that_is_running_says_how_far_it_is(tmp_path: Path) -> None:
    """Its clients are those of its rows, and nothing of it is final."""
    x = np.linspace(-1, 1, 40, dtype=np.float32).reshape(20, 2)
    clients = [(part, (part[:, 0] > 0).astype("int64")) for part in np.split(x, 4)]
    seen: dict[str, str] = {}

    def look(row: Any) -> None:
        if row["round"] == 2:
            seen["text"] = page_of([read_shown(tmp_path)])
            with pytest.raises(CheckpointError, match=r"running.*round 2.*--round") as raised:
                stored_run(tmp_path, None)
            assert "resume" not in str(raised.value)  # which the lock would refuse
            seen["evaluated"] = str(stored_run(tmp_path, 1).rows[1]["metrics"])

    given: dict[str, Any] = {
        "model": "mlp",
        "data": clients,
        "clients_per_round": "50%",
        "rounds": 3,
    }
    run = fedraclora.simulate(*WORDS[2:3], folder=tmp_path, on_round=look, **given)
    assert "2 of 3, running" in seen["text"]
    assert "final accuracy" not in seen["text"]
    assert "None" not in read_shown(tmp_path).clients
    assert seen["evaluated"] == str(run.rows[1]["metrics"])
    shown = read_shown(tmp_path)
    assert (shown.reached, shown.clients) == ("3", "4, of which 2 take part in a round")
    (tmp_path / "summary.json").unlink()
    shown = read_shown(tmp_path)
    assert (shown.reached, shown.clients) == ("3 of 3, not running", "2 take part in a round")


def test_that_measurements_are_withheld_is_in_the_report(
    runs: dict[str, fedraclora.RunResult],
) -> None:
    shown = read_shown(runs["fed_rac_lora"].folder or Path())
    told = {"clients": {"withheld": "too few of them"}}
    poorer = replace(shown, rows=[row | told if row["round"] else row for row in shown.rows])
    assert "too few of them" in page_of([poorer])
    assert "withheld" not in page_of([shown])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("no disk")])
def test_a_report_of_a_stopped_run_says_how_far_it_came_and_why(
    error: BaseException, tmp_path: Path
) -> None:
    def stop(row: Any) -> None:
        if row["round"] == 2:
            raise error

    def look(row: Any) -> None:
        if row["round"] == 3:
            seen.append(page_of([read_shown(tmp_path)]))

    x = np.linspace(-1, 1, 40, dtype=np.float32).reshape(20, 2)
    clients = [(part, (part[:, 0] > 0).astype("int64")) for part in np.split(x, 4)]
    given: dict[str, Any] = {"model": "mlp", "data": clients, "folder": tmp_path, "rounds": 3}
    seen = list[str]()
    with pytest.raises((KeyboardInterrupt, ValueError)):
        fedraclora.simulate(*WORDS[2:5], *FIXED, on_round=stop, **given)
    shown = read_shown(tmp_path)
    kind, why = ("interrupted", "Ctrl-C") if error is KeyboardInterrupt else ("failed", "no disk")
    assert (shown.state, shown.reached) == (kind, f"2 of 3, {kind}")
    text = page_of([shown])
    assert f"{kind} before its end, after round 2 of 3" in text
    assert why in text
    assert "final loss" not in text
    fedraclora.simulate(*WORDS[2:5], *FIXED, resume=True, on_round=look, **given)
    assert "3 of 3, running" in seen[0]
    assert "before its end" not in seen[0]
    shown = read_shown(tmp_path)
    assert (shown.state, shown.reached) == ("finished", "3")
    assert "final loss" in page_of([shown])
