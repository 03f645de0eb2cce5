"""`--check` of node and deploy: a line for each thing that would fail, and nothing is begun."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from flwr.supercore.error import ApiErrorCode
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedraclora.commands import check, cli, node
from fedraclora.engines.deploy import local
from fedraclora.engines.deploy.control import Connection
from fedraclora.engines.deploy.local import Identity, LocalDeployment, make_identity, make_node_key
from fedraclora.errors import ConfigError, EngineError

KNOWN, UNKNOWN = (
    ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL,
    ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED,
)
WORDS = ["data=own", "data.classes=3", "data.shape=[4]", "model=linear", "pretrain=none"]
WORDS += [
    "data.loss=cross_entropy",
    "clients=2",
    "clients_per_round=2",
    "rounds=1",
    "output.progress=false",
]


class Link(BaseHTTPRequestHandler):
    """Answers as a SuperLink does to a node that is to be activated, or otherwise."""

    status, code, late, health = 400, int(KNOWN), 0.0, 404
    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = json.dumps({"code": self.code, "detail": "..."}).encode()
        self.asked.append(self.path)
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response_only(self.status)
        there = datetime.now(UTC) + timedelta(seconds=self.late)
        self.send_header("date", format_datetime(there, usegmt=True))
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_response(self.health)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Owner:
    """What an owner has set up; a test spoils a part of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host, self.secure = folder, "127.0.0.1", True
        self.identity: Identity = make_identity(folder / "keys")
        make_node_key(folder / "node")
        self.key, self.roots = folder / "node", self.identity.certificate
        self.data, self.cache, self.clients = str(folder / "data"), folder / "cache", "1"
        Path(self.data).mkdir()
        rng = np.random.default_rng(0)
        x, target = rng.normal(size=(7, 4)).astype(np.float32), np.arange(7) % 3
        np.savez(folder / "data" / "1.npz", x=x, target=target)
        self.link = type("Link", (Link,), {"asked": []})
        self.port: int | None = None  # that of the server
        self.file: Path | None = None

    def check(self) -> int:
        server = ThreadingHTTPServer((self.host, 0), self.link)
        if self.secure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.identity.certificate, self.identity.key)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            return check.check_node(self.words(self.port or server.server_port), self.given)
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    @property
    def given(self) -> str | None:
        return None if self.file is None else str(self.file)

    def words(self, port: int) -> list[str]:
        words = [
            "--superlink",
            f"{self.host}:{port}",
            "--auth-supernode-private-key",
            str(self.key),
        ]
        words += ["--root-certificates", str(self.roots)]
        config = f"partition-ids='{self.clients}' data='{self.data}' cache='{self.cache}'"
        return [*words, "--node-config", config]


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return Owner(tmp_path)


def failing(owner: Owner, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The lines with a cross, by what was looked at."""
    status = owner.check()
    lines = [
        line[2:].partition(": ") for line in capsys.readouterr().out.splitlines() if line[0] == "✗"
    ]
    assert status == (1 if lines else 0)
    return {name: text for name, _, text in lines}


@pytest.mark.slow
def test_a_node_that_would_run_is_told_so_and_with_which_key(
    owner: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert owner.check() == 0
    lines = dict(
        line.removeprefix("✓ ").split(": ", 1) for line in capsys.readouterr().out.splitlines()
    )
    assert [*lines] == [
        "versions",
        "key",
        "address",
        "SuperLink",
        "clock",
        "data",
        "cache",
        "memory",
    ]
    public = owner.key.with_name("node.pub").read_text().strip()
    assert public in lines["key"]
    if keygen := shutil.which("ssh-keygen"):
        told = subprocess.run(
            [keygen, "-lf", f"{owner.key}.pub"], capture_output=True, text=True, check=True
        )
        assert told.stdout.split()[1] in lines["key"]
    assert "client 1: 7 samples, x [4], 3 values of target" in lines["data"]
    assert owner.link.asked == ["/v1/fleet/activate-node"], "it is asked this alone"


@pytest.mark.parametrize(
    ("mode", "text", "said"),
    [
        (0o640, None, "640.*chmod 600"),
        (0o600, "not a key", "ssh-keygen -t ecdsa"),
        (0o600, "", "kind"),
    ],
)
def test_a_key_that_flower_or_others_could_not_take_or_could(
    mode: int, text: str | None, said: str, owner: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    if text == "":
        key, form = ed25519.Ed25519PrivateKey.generate(), serialization.PrivateFormat.OpenSSH
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        text = key.private_bytes(pem, form, plain).decode()
    if text is not None:
        owner.key.write_text(text)
    owner.key.chmod(mode)
    found = failing(owner, capsys)
    assert [*found] == ["key"]
    assert re.search(said, found["key"])


def test_a_key_that_a_group_of_this_user_may_read_and_another_owns(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a cluster mounts secrets."""
    owner.key.chmod(0o440)
    monkeypatch.setattr(os, "geteuid", lambda: owner.key.stat().st_uid + 1)
    assert "key" not in failing(owner, capsys)
    owner.key.chmod(0o444)
    assert "444" in failing(owner, capsys)["key"]


def test_all_files_of_a_node_that_are_broken_are_named_at_once(
    owner: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    owner.clients = "1-3"
    Path(owner.data, "2.npz").write_text("no archive")
    np.savez(Path(owner.data, "3.npz"), x=np.zeros((7, 4)))
    found = failing(owner, capsys)
    assert [*found] == ["data"]
    assert re.search(r"/2\.npz .*; .*/3\.npz ", found["data"])
    assert "/1.npz" not in found["data"]


def test_files_that_are_missing(owner: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    owner.key, owner.roots, owner.data = Path("/no/key"), Path("/no/ca.crt"), "/no/data"
    found = failing(owner, capsys)
    assert {*found} == {"key", "address", "data"}
    owner.roots = owner.identity.certificate
    owner.check()
    assert "! SuperLink: not asked" in capsys.readouterr().out
    assert all(file in "".join(found.values()) for file in ("/no/key", "/no/ca.crt", "/no/data"))


def other_roots(owner: Owner) -> None:
    owner.roots = make_identity(owner.folder / "other").certificate


def no_roots(owner: Owner) -> None:
    owner.roots = owner.folder / "empty"
    owner.roots.write_text("nothing")


def another_name(owner: Owner) -> None:
    owner.host = "127.0.0.2"  # the certificate is for 127.0.0.1


def plain_http(owner: Owner) -> None:
    owner.secure = False


def closed_port(owner: Owner) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        owner.port = free.getsockname()[1]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_roots, "--root-certificates"),
        (no_roots, "--root-certificates"),
        (another_name, "mismatch"),
        (plain_http, "not use TLS"),
        (closed_port, "HOST:PORT"),
    ],
)
def test_a_way_that_leads_nowhere_or_to_somebody_else(
    spoil: Callable[[Owner], None], said: str, owner: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(owner)
    found = failing(owner, capsys)
    assert [*found] == ["address"], "what is not reached is not looked at"
    assert said in found["address"]


def test_a_certificate_that_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        past = datetime.now(UTC) - timedelta(days=local.DAYS + 1)
        patch.setattr(local, "datetime", SimpleNamespace(now=lambda _: past))
        owner = Owner(tmp_path)
    assert "expired" in failing(owner, capsys)["address"]


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (socket.gaierror(-2, "Name or service not known"), "/etc/hosts"),
        (TimeoutError(), "firewall"),
    ],
)
def test_a_host_that_is_unknown_or_silent(
    cause: Exception,
    said: str,
    owner: Owner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise httpx.ConnectError("no") from cause

    monkeypatch.setattr(FleetHttpClient, "ActivateNode", fail)
    assert said in failing(owner, capsys)["address"]


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (400, int(UNKNOWN), "[Ss]end the public"),
        (404, 0, "404 .*proxy forwards"),
        (502, 0, "502 .*SuperLink that runs"),
        (401, 0, "401 .*clock"),
    ],
)
def test_a_superlink_that_would_not_take_the_node(
    status: int, code: int, said: str, owner: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    owner.link.status, owner.link.code = status, code
    found = failing(owner, capsys)
    assert [*found] == ["SuperLink"]
    assert re.search(said, found["SuperLink"])


def test_a_superlink_that_anybody_may_start_runs_at(
    owner: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    owner.link.health, owner.host, owner.secure = 200, "127.0.0.2", False
    words = owner.words
    owner.words = lambda port: [*words(port)[:4], "--insecure", *words(port)[-2:]]
    assert "forward that path only" in failing(owner, capsys)["address"]


@pytest.mark.parametrize(("late", "said"), [(-60.0, "ahead"), (3600.0, "behind")])
def test_a_clock_that_is_wrong(
    late: float, said: str, owner: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    owner.link.late = late
    assert said in failing(owner, capsys)["clock"]


def test_data_of_a_module_that_is_not_here(
    owner: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    owner.data = "nowhere.data:owner"
    assert "nowhere" in failing(owner, capsys)["data"]


def test_a_cache_of_somebody_elses_a_full_disk_and_little_memory(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "HOST_BYTES", 1 << 60)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
        found = failing(owner, capsys)
    assert {*found} == {"cache", "memory"}
    assert all("make room" in text for text in found.values())
    owner.cache.chmod(0o777)
    assert "chmod go-w" in failing(owner, capsys)["cache"]


def listed(*states: str) -> list[dict[str, object]]:
    return [{"status": state} for state in states]


@pytest.fixture
def handed(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """What an operator hands over, whose nodes are connected."""

    def fail(*_: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(LocalDeployment, "__enter__", fail)
    monkeypatch.setattr(Connection, "submit", fail)
    monkeypatch.setattr(Connection, "nodes", lambda _: listed("online", "offline", "online"))
    owner.file = owner.folder / "run.yaml"
    words = [*WORDS, f"output.dir={owner.folder}/run", "connection=house", f"--check={owner.file}"]
    assert cli.run("deploy", words) == 0
    assert "✓ nodes: 1 offline, 2 online" in capsys.readouterr().out
    assert not (owner.folder / "run").exists()
    return owner.file


@pytest.mark.slow
def test_what_an_operator_hands_over_is_what_owners_are_compared_with(
    handed: Path, owner: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(owner, capsys) == {}
    x, target = np.zeros((7, 5), np.float32), np.arange(7) % 3
    np.savez(owner.folder / "data" / "1.npz", x=x, target=target)
    found = yaml.safe_load(handed.read_text())
    found["versions"]["torch"] = "1.0.0"
    handed.write_text(yaml.safe_dump(found))
    check.trainer_for.cache_clear()  # of a process, which is another each time
    wrong = failing(owner, capsys)
    assert {*wrong} == {"versions", "data"}
    assert "1.0.0" in wrong["versions"]
    assert "(4,)" in wrong["data"]


@pytest.mark.usefixtures("handed")
def test_nodes_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Connection, "nodes", lambda _: listed("registered"))
    assert cli.run("deploy", [*WORDS, "connection=house", "--check"]) == 1
    assert "none is online" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("handed")
def test_what_may_be_wrong_with_a_run_has_no_tick(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Connection, "known", lambda _: {"house": "127.0.0.1:8000"})
    file = owner.folder / "file"
    file.touch()
    words = [*WORDS, "clients=5", f"engine.folder={file}/run", "connection=house", "--check"]
    assert cli.run("deploy", words) == 0
    lines = dict(x.split(": ", 1) for x in capsys.readouterr().out.splitlines())
    assert "2 online for 5 clients" in lines["! nodes"]
    assert "data.test_file" in lines["! metrics"]
    assert f"cannot write to {file}" in lines["! folder"]
    assert "engine.folder" in lines["! folder"]


def test_a_connection_that_is_not_named_is_told_which_are(tmp_path: Path) -> None:
    text = '[superlink]\ndefault = "a"\n[superlink.house]\naddress = "127.0.0.1:8000"\n'
    (tmp_path / "config.toml").write_text(text)
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no")
    for name, said in (("houses", r"connection=houses: .*Use one of house"), ("house", "silent")):
        connection = Connection(name, {"FLWR_HOME": str(tmp_path)})
        with pytest.raises(EngineError, match=said):
            connection._read(failed, "nodes", "is silent")


def test_a_file_that_a_user_may_not_read_is_told_who_may(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, read = Path(owner.data, "1.npz"), Path.open
    file.chmod(0o600)

    def closed(path: Path, *words: Any, **named: Any) -> Any:
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *words, **named)

    monkeypatch.setattr(Path, "open", closed)
    told = failing(owner, capsys)["data"]
    assert f"Let user {os.geteuid()} read it" in told
    assert "mode 600" in told
    assert "whole" not in told


def test_help_of_a_node_has_its_own_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: 0)
    node.main(["--help"])
    assert "--check=FILE" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["a: [", "a: 1", "versions: 1\nconfig: {}"])
def test_a_file_that_no_operator_wrote(text: str, owner: Owner) -> None:
    owner.file = owner.folder / "run.yaml"
    owner.file.write_text(text)
    with pytest.raises(ConfigError, match="deploy --check=FILE"):
        owner.check()


def test_a_node_config_that_cannot_be_read(owner: Owner) -> None:
    owner.data = "a' b=c d='"
    with pytest.raises(ConfigError, match="--node-config"):
        owner.check()


def test_the_command_of_a_node_is_checked_with_one_word_more(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = []
    monkeypatch.setattr(check, "check_node", lambda *words: came.append(words) or 1)
    assert node.main([*owner.words(1), "--check=run.yaml"]) == 1
    assert node.main([*owner.words(1), "--approve=policy.yaml", "--check=run.yaml"]) == 1
    assert came == [(owner.words(1), "run.yaml", own) for own in (None, "policy.yaml")]


@pytest.mark.parametrize(
    ("policy", "mark"), [(None, "!"), ("ask", "!"), ("[]", "!"), ("[{digest}]", "\N{CHECK MARK}")]
)
def test_an_owner_sees_whether_the_run_is_approved_before_it_starts(
    handed: Path, owner: Owner, policy: str | None, mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = yaml.safe_load(handed.read_text())["digest"]
    if policy is not None and policy != "ask":
        (owner.folder / "policy.yaml").write_text(f"approved: {policy.format(digest=digest)}")
        policy = str(owner.folder / "policy.yaml")
    look = check.Checklist()
    check.of_approval(look, digest, policy)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{mark} approval")
    assert digest in line
    assert not look.failed


@pytest.mark.long
def test_flower_says_whether_it_knows_a_key_and_activates_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with LocalDeployment([[0]]) as link:
        for name in ("FLWR_HOME", "FEDRACLORA_SOCKETS"):
            monkeypatch.setenv(name, link.environ[name])
        for name in ("known", "unknown"):
            make_node_key(tmp_path / name)
        link.register(tmp_path / "known.pub")
        common = ["--superlink", f"{local.HOST}:{local.LINK}"]
        common += ["--root-certificates", str(link.identity.certificate)]
        common += ["--node-config", f"partition-id=1 cache='{tmp_path}/cache'"]
        key = "--auth-supernode-private-key"
        assert check.check_node([*common, key, str(tmp_path / "known")], None) == 0
        assert "it knows the key" in capsys.readouterr().out
        assert check.check_node([*common, key, str(tmp_path / "unknown")], None) == 1
        assert "✗ SuperLink" in capsys.readouterr().out
        states = [node["status"] for node in link.connection.nodes()]
        assert "registered" in states, "it would be online if it were activated"
