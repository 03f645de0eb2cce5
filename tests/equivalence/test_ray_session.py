"""A Ray that a run starts is reached by nobody else, and nothing of it stays."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
import ray
from listeners import listeners, needs_proc, off_loopback
from ray._private import utils

from fedraclora.config.settings import RayConfig
from fedraclora.engines.private_ray import LONGEST, RayFolder
from fedraclora.engines.ray.cluster import Cluster
from fedraclora.errors import EngineError

pytestmark = pytest.mark.long

# One call of each of Ray's services; a service that a process does not have is UNIMPLEMENTED there.
CALLS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Push",
    "CoreWorkerService/PushTask",  # runs code
)
AGENTS = ("ray::RuntimeEnvAgent", "runtime_env/agent/main.py")  # speaks HTTP; its name comes late


def answer_to_a_stranger(port: int, call: str) -> str:
    """Give the status of the answer to a call without a token."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=30)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def http_answer_to_a_stranger(port: int) -> int:
    """Give the status of the answer to a request without a token."""
    url = f"http://127.0.0.1:{port}/get_or_create_runtime_env"
    with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(url, data=b""):
        pass
    refused.value.close()
    return refused.value.code


@needs_proc
def test_only_this_user_on_this_machine_reaches_it() -> None:
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    cluster = Cluster(RayConfig(workers=1), "cpu")
    try:
        assert signal.getsignal(signal.SIGTERM) is handler
        found = listeners()
        assert any("gcs_server" in command for command in found.values())
        assert off_loopback(found) == {}
        for address, command in found.items():
            port = int(address.rpartition(":")[2], 16)
            program = command.partition(" --")[0]
            if any(agent in program for agent in AGENTS):
                assert http_answer_to_a_stranger(port) == 401
            else:
                answers = {answer_to_a_stranger(port, call) for call in CALLS}
                assert answers == {"UNAUTHENTICATED", "UNIMPLEMENTED"}, command
        folder = Path(os.environ["RAY_TMPDIR"])
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert [*folder.glob("ray/session_*/sockets/*")]
    finally:
        cluster.close()
    assert not folder.exists()
    assert listeners().keys() & found.keys() == set()
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_ray_that_listens_elsewhere_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one would that no longer knows how it is told to listen here alone."""
    ended = []

    class Context:
        gcs_address = "192.0.2.7:6379"

    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    with pytest.raises(EngineError, match=r"listens at 192\.0\.2\.7:6379, .* other machines"):
        Cluster(RayConfig(), "cpu")
    assert ended


def test_a_ray_that_starts_too_slowly_is_an_error_of_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", slow)
    with pytest.raises(EngineError, match="timed out during startup"):
        Cluster(RayConfig(), "cpu")
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_ray_starts_waits_and_is_an_interrupt(
    sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own handler would exit with the signal's number, from the midst of the start."""
    started = []

    def start(**_: object) -> None:
        utils.set_sigterm_handler(lambda number, _: sys.exit(number))
        signal.raise_signal(sign)
        started.append(True)

    monkeypatch.setattr(ray, "init", start)
    before = signal.signal(sign, signal.default_int_handler)  # a shell's background jobs hear none
    try:
        with pytest.raises(KeyboardInterrupt):
            Cluster(RayConfig(), "cpu")
        assert signal.getsignal(sign) is signal.default_int_handler
    finally:
        signal.signal(sign, before)
    assert started
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), 9)", "", "word.close()"])
def test_a_process_that_ray_ends_has_a_last_word(end: str) -> None:
    code = "import os; from fedraclora.engines.private_ray import ExitReporter as E; word = E(); "
    command = [sys.executable, "-c", code + end]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert ("process of this run" in done.stderr) == ("os." in end)


def test_the_folder_is_short_wherever_temporary_files_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's sockets lie deep below it, and the path of a socket may have 107 characters."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 10)))
    folder = RayFolder()
    assert len(str(folder.path)) <= LONGEST
    folder.close()
    assert not folder.path.exists()
