"""`fedraclora watch`: what the page is told of a run, who may ask, and how a browser shows it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

import fedraclora
from fedraclora.commands import cli
from fedraclora.commands.watch import watch_options, watched
from fedraclora.commands.watch.server import PageServer, serving
from fedraclora.commands.watch.status import Watched
from fedraclora.errors import ConfigError
from fedraclora.run import packed

X = np.linspace(-1, 1, 80, dtype=np.float32).reshape(40, 2)
CLIENTS = [(part, (part[:, 0] > 0).astype("int64")) for part in np.split(X, 4)]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def simulated(folder: Path, **keys: Any) -> fedraclora.RunResult:
    given: dict[str, Any] = {"model": "mlp", "data": CLIENTS, "clients_per_round": 2, "rounds": 3}
    words = ("output.progress=false", "output.plots=false")
    return fedraclora.simulate(*words, folder=folder, **given | keys)


def got(url: str, path: str = "", **headers: str) -> tuple[int, bytes]:
    """Status and body of a GET below an address."""
    place = urlsplit(url)
    link = http.client.HTTPConnection("127.0.0.1", place.port or 0, timeout=30)
    link.request("GET", place.path + path, headers=headers)
    answer = link.getresponse()
    return answer.status, answer.read()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fedraclora.RunResult:
    folder = tmp_path_factory.mktemp("runs") / "one"
    return simulated(folder, evaluate={"clients": "all", "share": 0.3})


@pytest.fixture
def page(run: fedraclora.RunResult) -> Iterator[PageServer]:
    assert run.folder is not None
    with serving(run.folder, 0) as server:
        yield server


def test_of_a_finished_run_all_is_told(run: fedraclora.RunResult, page: PageServer) -> None:
    status = json.loads(got(page.url, "status.json")[1])
    assert (status["state"], status["done"], status["of"]) == ("finished", 3, 3)
    assert status["left"] is None
    accuracy = run.history["accuracy"].tolist()
    assert status["headline"]["value"] == f"{accuracy[-1]:.4f}"
    assert "since" not in status
    assert any("4, of which 2" in text for text in status["cards"].values())
    figures = json.loads(got(page.url, "figures.json")[1])
    assert figures["accuracy by round"]["data"][0]["y"] == pytest.approx(accuracy)
    assert "accuracy of the clients" in figures


@pytest.mark.slow
def test_a_run_is_followed_while_it_runs(tmp_path: Path) -> None:
    folder, seen = tmp_path / "run", list[dict[str, Any]]()
    with serving(folder, 0) as server:
        assert json.loads(got(server.url, "status.json")[1])["state"] == "starting"

        def look(row: Any) -> None:
            seen.append(json.loads(got(server.url, "status.json")[1]))

        simulated(folder, on_round=look)
        after = json.loads(got(server.url, "status.json")[1])
    assert [each["state"] for each in seen] == ["running"] * 4
    assert [each["done"] for each in seen] == [0, 1, 2, 3]
    assert {each["of"] for each in seen} == {3}
    assert seen[1]["left"] > 0
    assert "round 1 of 3" in seen[1]["text"]
    assert all("since" in each for each in seen)
    assert "final" not in str(seen)
    assert "None" not in str(seen[1]["cards"])
    assert len({each["version"] for each in seen}) == 4
    assert after["state"] == "finished"


def test_a_run_is_running_until_its_summary_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while its figures are drawn, after its last round."""
    seen = list[str]()
    monkeypatch.setattr(
        "fedraclora.strategies.runner.draw",
        lambda *_: seen.append(Watched(tmp_path).status()["state"]),
    )
    fedraclora.simulate(model="mlp", data=CLIENTS, rounds=1, folder=tmp_path)
    assert seen == ["running"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_run_that_stopped_says_why_and_is_followed_when_it_is_resumed(
    error: type[BaseException], tmp_path: Path
) -> None:
    watching, seen = Watched(tmp_path), list[dict[str, Any]]()

    def stop(row: Any) -> None:
        if row["round"] == 2:
            raise error("the power went")

    def look(row: Any) -> None:
        seen.append(watching.status())

    with pytest.raises(error):
        simulated(tmp_path, on_round=stop, output={"checkpoint_every": 1})
    status = watching.status()
    assert status["state"] == {KeyboardInterrupt: "interrupted", ValueError: "failed"}[error]
    assert "power" in status["why"]
    assert (status["done"], status["of"]) == (2, 3)
    simulated(tmp_path, resume=True, on_round=look, output={"checkpoint_every": 1})
    assert seen[-1]["state"] == "running"
    assert seen[-1]["why"] == ""
    assert watching.status()["state"] == "finished"


def test_clients_whose_replies_are_missed_and_late_nodes_are_named(
    run: fedraclora.RunResult, tmp_path: Path
) -> None:
    from dataclasses import replace

    from fedraclora.commands.report.page import read_shown
    from fedraclora.commands.watch.status import described

    assert run.folder is not None
    shown = read_shown(run.folder)
    rows = [dict(row) for row in shown.rows]
    rows[1] |= {"failures": [{"client": 3, "reason": "no reply in 60 s"}]}
    rows[2] |= {"failures": [{"client": 1, "reason": "no disk"}, {"client": 3, "reason": "away"}]}
    rows[3] |= {"incidents": ["client 0 replied after 40 s, half of all by then within 2 s"]}
    status = described(replace(shown, rows=rows))
    found = [(each["client"], each["times"], each["last"]) for each in status["clients"]]
    assert found == [(3, 2, 2), (1, 1, 2)]
    assert "away" in status["clients"][0]["why"]
    assert status["events"][-1] == (3, rows[3]["incidents"][0])


def test_several_runs_stand_below_each_other(tmp_path: Path) -> None:
    for name in ("ffa_lora", "fedavg_lora"):
        simulated(tmp_path / name, method=name, rounds=1)
    watching = Watched(tmp_path)
    status = watching.status()
    assert (status["state"], status["done"], status["of"]) == ("finished", 2, 2)
    assert len(status["table"]) == 2
    lines = json.loads(watching.figures())["accuracy by round"]["data"]
    assert len({line["name"] for line in lines}) == 2


def test_of_many_runs_the_twelve_that_wrote_last_are_shown(
    run: fedraclora.RunResult, tmp_path: Path
) -> None:
    assert run.folder is not None
    for age in range(15):
        folder = shutil.copytree(run.folder, tmp_path / f"run {20 - age}")
        if age < 3:  # the oldest did not end
            (folder / "summary.json").unlink()
            rows = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
            (folder / "ledger.jsonl").write_text("".join(rows[:-1]))
        for path in folder.iterdir():
            os.utime(path, (1e9 + age, 1e9 + age))
    status = Watched(tmp_path).status()
    assert (status["done"], status["of"]) == (12 * 3, 12 * 3)  # rounds


@pytest.mark.slow
def test_a_tuning_says_what_of_its_budget_is_spent(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    watching, seen = Watched(tmp_path), list[dict[str, Any]]()

    def look(row: Any) -> None:
        seen.append(watching.status())

    given: dict[str, Any] = {"data": CLIENTS, "model": "mlp", "rounds": 2, "on_round": look}
    fedraclora.tune(
        "output.progress=false", folder=tmp_path, tune={"runs": 3, "rungs": []}, **given
    )
    running = [each for each in seen if each["state"] == "running"]
    assert {each["done"] for each in running} == {0, 1, 2}
    assert {each["of"] for each in running} == {3}
    status = watching.status()
    assert (status["state"], status["done"], status["of"]) == ("finished", 3, 3)
    assert len(status["table"]) == 3
    ends = [float(row["metric"]) for row in status["table"] if row["state"] == "done"]
    assert float(status["headline"]["value"]) == max(ends)
    figures = json.loads(watching.figures())
    assert sum(len(line["x"]) for line in figures[[*figures][1]]["data"]) == 3


def test_a_study_says_which_runs_of_each_row_are_done(tmp_path: Path) -> None:
    kept = Path(__file__).parents[2] / "experiments" / "results" / "basis_mnist"
    for name in ("study.yaml", "runs.jsonl.xz"):
        shutil.copy(kept / name, tmp_path)
    watching = Watched(tmp_path)
    status = watching.status()
    assert (status["state"], status["done"], status["of"]) == ("finished", 40, 40)
    assert all("5 of 5" in row.values() for row in status["table"])
    assert all(len(f["data"]) == 4 for f in json.loads(watching.figures()).values())
    packed.decompress(tmp_path / "runs.jsonl")
    lines = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[:7]))
    after = watching.status()
    assert (after["state"], after["done"]) == ("unfinished", 7)
    assert after["version"] > status["version"]


def test_a_damaged_folder_is_said_and_served(run: fedraclora.RunResult, tmp_path: Path) -> None:
    assert run.folder is not None
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{")
    status = Watched(tmp_path / "run").status()
    assert status["state"] == "unreadable"
    assert "summary.json" in status["why"]


# ---- Who may read it ----------------------------------------------------------------------------


def test_it_listens_on_this_machine_alone(page: PageServer) -> None:
    assert page.socket.getsockname()[0] == "127.0.0.1"
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    for address in others - {"127.0.0.1", "::1"}:
        with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
            socket.create_connection((str(address), page.port), timeout=5)


def test_another_host_in_a_request_is_refused(page: PageServer) -> None:
    """As where a page of somebody's site has its own name lead to this machine."""
    for host in ("evil.example", f"evil.example:{page.port}", "127.0.0.1", ""):
        status, body = got(page.url, "status.json", Host=host)
        assert status == 403, host
        assert b"accuracy" not in body
    for host in (f"127.0.0.1:{page.port}", f"localhost:{page.port}"):
        assert got(page.url, "status.json", Host=host)[0] == 200


def test_nothing_else_is_read_or_written(page: PageServer, run: fedraclora.RunResult) -> None:
    assert run.folder is not None
    before = {path: path.stat().st_mtime for path in run.folder.rglob("*")}
    paths = ["config.yaml", "../config.yaml", "%2e%2e/config.yaml", "/etc/passwd", "?a=1", "x/../"]
    for path in paths:
        assert got(page.url, path)[0] == 404, path
    root = f"http://127.0.0.1:{page.port}/"
    for path in ("", "status.json", "figures.json"):  # who does not know the address of the page
        assert got(root, path)[0] == 404
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        link = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
        link.request(method, f"{urlsplit(page.url).path}status.json")
        assert link.getresponse().status in {405, 501}
    assert {path: path.stat().st_mtime for path in run.folder.rglob("*")} == before


def test_the_page_loads_nothing_from_elsewhere(page: PageServer) -> None:
    place = urlsplit(page.url)
    link = http.client.HTTPConnection("127.0.0.1", place.port or 0, timeout=30)
    link.request("GET", place.path)
    answer = link.getresponse()
    text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "://" not in text
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy


# ---- From the command line ----------------------------------------------------------------------


def test_the_command_ends_with_an_interruption(
    run: fedraclora.RunResult, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def serve(self: PageServer, poll: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", serve)
    assert cli.run("watch", [str(run.folder)]) == 0
    assert "http://127.0.0.1:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere"),
        ([".", "port=80000"], "port=80000"),
        ([".", "port=x"], "port='x'"),
    ],
)
def test_what_cannot_be_watched_is_refused(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run("watch", words) == 1
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(page: PageServer, run: fedraclora.RunResult) -> None:
    with pytest.raises(ConfigError, match=f"port={page.port}"):
        PageServer(run.folder or Path(), page.port)


@pytest.mark.slow
def test_a_command_serves_the_page_while_it_runs(tmp_path: Path, capsys: Any) -> None:
    with watch_options(["rounds=3", "watch=true"]) as rest:
        assert rest == ["rounds=3"]
        with watched(tmp_path):
            url = capsys.readouterr().err.split()[-1]
            assert got(url, "status.json")[0] == 200
        with pytest.raises(ConnectionError):
            got(url, "status.json")
        with pytest.raises(ConfigError, match=r"watch=true.*sweep"), watched(tmp_path, sweep=True):
            pass
    with watch_options(["rounds=3"]), watched(tmp_path):
        assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="watch='maybe'"), watch_options(["watch=maybe"]):
        pass


@pytest.mark.slow
def test_a_page_that_is_looked_at_is_told_the_end(tmp_path: Path) -> None:
    """The command goes on serving for a moment, until the page has asked once more."""
    states, over = list[str](), threading.Event()

    def look(url: str) -> None:
        while not over.wait(0.2) and "finished" not in states:
            states.append(json.loads(got(url, "status.json")[1])["state"])

    with serving(tmp_path / "run", 0) as server:
        reader = threading.Thread(target=look, args=(server.url,))
        reader.start()
        while not states:  # the page is open before the run begins, which may take no time
            over.wait(0.05)
        simulated(tmp_path / "run")
    over.set()
    reader.join()
    assert states[-1] == "finished"


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
def test_a_browser_follows_a_run_from_its_start_to_its_end(
    width: int, browser: Any, tmp_path: Path
) -> None:
    from playwright.sync_api import expect  # the page's own rules forbid what waits by a script

    context = browser.new_context(viewport={"width": width, "height": 900})
    page, wrong, asked_for = context.new_page(), [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked_for.append(request.url))
    folder, texts = tmp_path / "run", list[str]()

    def look(row: Any) -> None:
        expect(page.locator("#text")).to_contain_text(f"round {row['round']} of 3", timeout=30_000)
        texts.append(page.inner_text("#state"))

    with serving(folder, 0) as server:
        page.goto(server.url)
        expect(page.locator("#state")).to_have_text("starting", timeout=30_000)
        run = simulated(folder, on_round=look)
        expect(page.locator("#state")).to_have_text("finished", timeout=30_000)
        expect(page.locator("#text")).to_contain_text("3 rounds")
        expect(page.locator(".plot .main-svg").nth(6)).to_be_attached(timeout=30_000)
        y = page.evaluate(
            "Array.from(Array.from(document.querySelectorAll('.card'))"
            ".find(c => c.innerText.startsWith('accuracy by round'))"
            ".querySelector('.plot').data[0].y)"
        )
        assert y == pytest.approx(run.history["accuracy"].tolist())
        assert page.inner_text("#value") == f"{run.history['accuracy'].iloc[-1]:.4f}"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    expect(page.locator("#gone")).to_be_visible(timeout=30_000)
    assert texts == ["running"] * 4
    assert wrong == []
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked_for)
    context.close()
