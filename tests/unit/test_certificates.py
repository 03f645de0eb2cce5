"""Operators and owners are told before a certificate ends, and after it."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from fedraclora.commands import node
from fedraclora.engines.certificates import folder_warnings, superlink_warning
from fedraclora.engines.deploy import local
from fedraclora.engines.deploy.control import Connection
from fedraclora.engines.deploy.local import make_identity


@pytest.fixture
def identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int) -> local.Identity:
    monkeypatch.setattr(local, "DAYS", days)
    return make_identity(tmp_path)


@pytest.mark.parametrize(
    ("days", "said"), [(40, ""), (29, "in 28 days"), (1, "in 0 days"), (0, "has expired")]
)
def test_a_certificate_of_a_folder_is_named_from_30_days_before_its_end(
    identity: local.Identity, said: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.pem").write_text("no certificate")
    found = folder_warnings(tmp_path)
    assert len(found) == bool(said)
    assert all(said in each and str(identity.certificate) in each for each in found)
    sections = f'[superlink.house]\nroot-certificates = "{identity.certificate}"\n'
    (tmp_path / "config.toml").write_text(f'{sections}[superlink.other]\naddress = "a:1"\n')
    environ = {"FLWR_HOME": str(tmp_path)}
    assert Connection("house", environ).certificate_warnings() == found
    assert Connection("other", environ).certificate_warnings() == []


@pytest.mark.parametrize(
    ("days", "said"), [(40, ""), (29, "in 28 days: tell the operator"), (0, "has expired")]
)
def test_a_node_says_that_the_certificate_it_is_shown_ends(
    identity: local.Identity, said: str, tmp_path: Path
) -> None:
    shown = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    shown.load_cert_chain(identity.certificate, identity.key)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            link, _ = listening.accept()
            with link, suppress(OSError):  # the other end takes no such certificate
                shown.wrap_socket(link, server_side=True).close()

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        words = ["--superlink", address, "--root-certificates", str(identity.certificate)]
        found = node.certificate_warning(words)
        thread.join()
    assert said in found
    assert bool(found) == bool(said)
    assert not found or address in found
    assert not superlink_warning(address, identity.certificate)  # nothing listens there
    assert not superlink_warning("link", tmp_path / "none")
