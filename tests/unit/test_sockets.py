"""Flower's programs listen at sockets where no other user of the machine can come."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from inspect import getsource
from pathlib import Path

import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.interceptors.http import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf import client
from flwr.supercore.runtime.runtime_http_client import RuntimeHttpClient

from fedraclora.commands import cli
from fedraclora.engines import flower_patches
from fedraclora.engines.flower_patches import SOCKETS, own_api, patch, sockets
from fedraclora.engines.programs import Address, environment
from tests.equivalence.listeners import listeners, needs_proc
from tests.strangers import as_stranger, needs_root


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A node as an owner of data starts it, whose SuperLink is not there: its socket and number."""
    home = tmp_path_factory.mktemp("n")
    words = [sys.executable, "-m", "fedraclora.commands.cli", "node", "--insecure"]
    environ = {**environment(home), "TMPDIR": str(home)}
    del environ[SOCKETS]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [*words, "--superlink", "127.0.0.1:9"], env=environ, stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + 120
        while not (found := [p for p in home.glob("fedraclora-*/api") if Address(2, p).listens()]):
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        yield found[0], process.pid
        process.send_signal(signal.SIGHUP)  # as SIGTERM, which Flower itself hears
        assert process.wait(60) == 0
        assert not [*home.glob("fedraclora-*")]  # its folder goes with it
    finally:
        process.kill()
        process.wait()


def take_task(path: Path) -> object:
    """Ask a node for a task, as its own program for that does."""
    os.environ[SOCKETS] = json.dumps({"127.0.0.1:2": str(path)})
    patch("flwr-clientapp")
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    flower = RuntimeHttpClient.from_server_address("127.0.0.1:2", True, None, [version])
    with closing(flower):
        return flower.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))


def taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(client, "httpx", client.httpx)  # type: ignore[attr-defined]
    monkeypatch.setenv(SOCKETS, "{}")
    return take_task(path)


def test_a_node_answers_its_own_user(
    node: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = node
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert taken(path, monkeypatch) == AcquireTaskResponse()  # there is none


@needs_root
def test_another_user_takes_no_task_of_a_node(
    node: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = node
    said = as_stranger(lambda: taken(path, monkeypatch))
    assert said.startswith("ConnectError: [Errno 13] Permission denied"), said
    assert as_stranger(lambda: [*path.parent.iterdir()]).startswith("PermissionError")


@needs_proc
def test_a_node_listens_at_no_port(node: tuple[Path, int]) -> None:
    _, pid = node
    assert listeners(pid) == {}


def test_a_token_is_in_no_list_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    started = list[list[str]]()
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: started.append(words))
    flower_patches.start(["flwr-serverapp", "--token", "secret", "--insecure"])
    ((python, _, script, *words),) = started
    assert (python, script) == (sys.executable, flower_patches.__file__)
    name, option, file, *rest = words
    assert (name, option, rest) == ("flwr-serverapp", "--token-file", ["--insecure"])
    assert Path(file).read_text() == "secret"
    assert stat.S_IMODE(Path(file).stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["127.0.0.1:8000=/run/link/api", '["/run/link/api"]'])
def test_where_sockets_are_must_be_readable(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all would listen at ports, without a word."""
    monkeypatch.setenv(SOCKETS, text)
    with pytest.raises(SystemExit, match="JSON like"):
        patch("flower-superlink")


def test_flower_has_one_way_to_call() -> None:
    """And every client of it goes that way."""
    assert len(re.findall(r"httpx\.Client\(", getsource(client))) == 1
    flower = Path(client.__file__).parents[2]
    others = [
        path.name
        for path in flower.rglob("*.py")
        if re.search(r"httpx\.(Async)?Client\(", path.read_text()) and "connector" not in path.parts
    ]
    assert others == ["client.py"]  # a connector calls services elsewhere


def test_the_socket_of_a_node_has_a_path_that_a_socket_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tmp_path / ("far" * 30)
    far.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(far))
    monkeypatch.setattr(sys, "argv", ["flower-supernode"])
    monkeypatch.setenv(SOCKETS, "{}")
    with own_api():
        ((address, path),) = sockets().items()
    assert len(path) <= 107
    assert sys.argv[1:] == ["--host", *" --port ".join(address.split(":")).split()]


@pytest.mark.parametrize(
    "word", ["--port", "--host=0.0.0.0", "--isol", "--superexec-auth-secret-file", "--ssl-keyfile"]
)
def test_a_node_refuses_to_listen_elsewhere(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("node", ["--insecure", word, "8000"]) == 1
    assert "private socket" in capsys.readouterr().err
