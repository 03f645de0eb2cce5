"""The SuperNode with short pauses: how long they are, and what of Flower it relies on."""

from __future__ import annotations

import inspect
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import subprocess_executor
from flwr.supernode import start_client_internal

from fedraclora.engines.deploy import supernode
from fedraclora.engines.deploy.local import SUPERNODE
from fedraclora.engines.deploy.supernode import Pauses, put


@pytest.mark.parametrize(
    ("module", "name", "used"),
    [
        (start_client_internal, "time", {"sleep"}),
        (start_client_internal, "subprocess", {"Popen"}),
        (run_superexec, "time", {"sleep"}),
        (subprocess_executor, "subprocess", {"Popen", "DEVNULL"}),
    ],
)
def test_no_more_is_used_of_what_is_replaced(module: ModuleType, name: str, used: set[str]) -> None:
    assert {*re.findall(rf"\b{name}\.(\w+)", inspect.getsource(module))} == used


def test_every_message_passes_what_is_replaced() -> None:
    """It is looked up when it is called, and once in each turn of the loop."""
    source = inspect.getsource(start_client_internal.start_client_internal)
    assert len(re.findall(r"\b_push_messages\(", source)) == 1


def test_a_name_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        put(SimpleNamespace(time=1), no_such_name=2)


def test_pauses_are_a_tenth_of_the_time_since_something_happened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, slept = [50.0], list[float]()
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=slept.append)
    monkeypatch.setattr(supernode, "time", clock)
    pauses = Pauses()
    for seconds in (50.2, 52.0, 60.0, 500.0):
        now[0] = seconds
        pauses.sleep(3.0)
    pauses.note()
    pauses.sleep(3.0)
    assert slept == pytest.approx([0.1, 0.2, 1.0, 3.0, 0.1])


def test_it_imports_nothing_of_this_project() -> None:
    """An app brings its own copy, which a module that is loaded would hide."""
    words = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-c", words, str(SUPERNODE)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in loaded if name.partition(".")[0] in {"fedraclora", "flwr"}]


def test_a_process_for_each_command_line_is_forked_until_nobody_asks(tmp_path: Path) -> None:
    """Flower is stood in for: each process is told its words, and is another."""
    stand_in = tmp_path / "flwr" / "supernode" / "cli"
    stand_in.mkdir(parents=True)
    (tmp_path / "flwr" / "__init__.py").touch()
    (tmp_path / "flwr" / "supernode" / "__init__.py").touch()
    (stand_in / "__init__.py").write_text(
        "import os, sys, time\n"
        "def flwr_clientapp():\n"
        "    print(*sys.argv, os.getpid(), os.getppid(), flush=True)\n"
        "    if sys.argv[-1] == 'long':\n"
        "        time.sleep(60)\n"
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        words = "import runpy, socket, sys; scope = runpy.run_path(sys.argv[1]); "
        words += "scope['run_clientapps'](socket.socket(fileno=int(sys.argv[2])))"
        with subprocess.Popen(
            [sys.executable, "-c", words, str(SUPERNODE), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={"PYTHONPATH": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            theirs.close()
            for token in ("one", "two"):
                ours.send(f'["flwr-clientapp", "--token", "{token}"]'.encode())
            assert process.stdout is not None
            lines = sorted(process.stdout.readline().split() for _ in range(2))
            ours.send(b'["flwr-clientapp", "--token", "long"]')
            assert process.stdout.readline().split()[2] == "long"
            ours.close()
            assert process.wait() == 0
            assert process.stdout.read() == ""  # the last of them ends with it
    assert [line[:3] for line in lines] == [
        ["flwr-clientapp", "--token", t] for t in ("one", "two")
    ]
    assert {line[4] for line in lines} == {str(process.pid)}
    assert len({line[3] for line in lines} | {str(process.pid)}) == 3
