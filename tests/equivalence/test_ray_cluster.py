"""A Ray cluster that others started is joined and left, and gives the bits of this process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedraclora.engines.ray.cluster import check_address
from fedraclora.errors import EngineError
from tests.common import summary_of

pytestmark = pytest.mark.long

WORDS = (
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "model.hidden=[12]",
    "method.rank=2",
    "clients=20",
    "clients_per_round=12",
    "rounds=3",
    "local.lr=0.1",
    "output=study",
)
DIGESTS = ("weights_digest", "ledger_digest")


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "7d" * 32}


@pytest.fixture
def address() -> Iterator[str]:
    """Start a head with two CPUs, which asks for a token, in a process of its own; end it after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        words = ["--head", "--block", f"--port={address.rpartition(':')[2]}", "--num-cpus=2"]
        words += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"]
        head = subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | TOKEN,
        )
        try:
            end = time.monotonic() + 120
            while head.poll() is None and time.monotonic() < end:
                with suppress(EngineError):
                    check_address(address)
                    break
                time.sleep(0.2)
            yield address
            assert head.poll() is None  # those who joined have left it alone
        finally:
            head.terminate()
            head.wait(timeout=60)


def digests(folder: Path, *words: str) -> list[str]:
    command = [sys.executable, "-m", "fedraclora.commands.cli", "simulate", *WORDS, *words]
    end = time.monotonic() + 60
    while True:  # the head listens a moment before its node is there
        done = subprocess.run(
            [*command, f"output.dir={folder}"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **TOKEN},
        )
        if done.returncode == 0 or time.monotonic() > end:
            break
    assert done.returncode == 0, done.stderr
    found = summary_of(folder)
    return [found[name] for name in DIGESTS]


def test_a_cluster_is_joined_and_left_and_joined_again(address: str, tmp_path: Path) -> None:
    """By those who have its token."""
    wanted = digests(tmp_path / "here")
    for name in ("first", "second"):
        assert digests(tmp_path / name, "engine=ray", f"engine.address={address}") == wanted
    words = ["engine=ray", f"engine.address={address}", f"output.dir={tmp_path / 'stranger'}"]
    done = subprocess.run(
        [sys.executable, "-m", "fedraclora.commands.cli", "simulate", *WORDS, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "engine.address" in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) < 10  # and not a minute of Ray's
