"""Whatever goes wrong ends in one message and a status; only a bug shows its traceback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedraclora.commands.status import (
    composing,
    ending_on_signals,
    exiting_on_signals,
    explained,
    report_error,
    reported,
)
from fedraclora.errors import CheckpointError, ConfigError


def of_config(**keys: object) -> OmegaConfBaseException:
    with pytest.raises(OmegaConfBaseException) as caught:
        OmegaConf.to_container(OmegaConf.create(keys), resolve=True, throw_on_missing=True)
    return caught.value


FORESEEN: dict[str, tuple[Exception, list[str]]] = {
    "on purpose": (ConfigError("method.rank=0"), ["method.rank=0"]),
    "disk full": (
        OSError(errno.ENOSPC, "No space left on device", "run/ledger.jsonl"),
        ["run/ledger.jsonl", "No space left", "make room"],
    ),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), ["quota", "make room"]),
    "read-only": (
        OSError(errno.EROFS, "Read-only file system", "run/.lock"),
        ["run/.lock", "another output.dir"],
    ),
    "not allowed": (PermissionError(errno.EACCES, "Permission denied", "run"), ["run: Permission"]),
    "long name": (OSError(errno.ENAMETOOLONG, "File name too long", "x"), ["shorter name"]),
    "memory": (MemoryError(), ["memory ran out", "local.batch_size"]),
    "memory of torch": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ["memory ran out", "allocate 9 bytes"],
    ),
    "closed to this user": (
        PermissionError(13, "Permission denied", "/etc/flower/node"),
        ["/etc/flower/node: Permission denied", f"user {os.geteuid()} read"],
    ),
    "missing value": (of_config(seed="???"), ["seed=???", "set seed=VALUE"]),
    "unknown reference": (of_config(rank="${foo}"), ["rank takes its value", "'foo' not found"]),
    "circle": (of_config(a="${b}", b="${a}"), ["takes its value", "Recursive"]),
    "no resolver": (of_config(a="${nix:3}"), ["a takes its value", "nix"]),
    "words": (ConfigCompositionException("Could not override 'x'.\nUse +x"), ["Use +x"]),
    # An OSError to Python.
    "no such file": (MissingConfigException("no data/x", "data/x"), ["no data/x"]),
}


@pytest.mark.parametrize("case", FORESEEN)
def test_what_a_user_can_mend_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, said = FORESEEN[case]
    assert report_error(error) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert [part for part in said if part not in printed] == []


def test_a_text_in_a_message_moves_no_cursor_and_is_no_message_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report_error(ConfigError("no folder a\nerror: done\x1b[2J\r\x9b31m[/red]"))
    printed = capsys.readouterr().err
    assert printed == "error: no folder a\n  error: done\\x1b[2J\\r\\x9b31m[/red]\n"


def test_a_bug_keeps_its_traceback_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    @reported
    def command() -> int:
        return {}["nothing"]  # type: ignore[no-any-return]

    assert explained(KeyError("nothing")) is None
    assert command() == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "bug of fedraclora" in printed.splitlines()[-1]


def test_the_status_of_a_command_is_its_own() -> None:
    assert (reported(lambda: 0)(), reported(lambda: 3)()) == (0, 3)


def test_what_hydra_raises_by_mistake_speaks_of_the_words() -> None:
    with pytest.raises(ConfigError, match=r"these arguments: got int.*group=choice"), composing():
        raise ValueError("got int")
    with pytest.raises(CheckpointError, match="kept"), composing():
        raise CheckpointError("kept")


INTERRUPTED = """
import importlib, os, signal, sys
from fedraclora.commands import cli

cli.main(["--help"])
assert not {"torch", "hydra", "numpy"} & set(sys.modules), "it loads what takes seconds"

def load(name):
    try:
        os.kill(os.getpid(), signal.%s)
        for _ in range(1000):
            pass
    except BaseException as error:  # as modules of C do, in the middle of their own import
        raise ImportError("half loaded") from error

importlib.import_module = load
cli.main(["simulate"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupt_while_libraries_are_loaded_is_one_word(name: str) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED % name],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_terminal_that_closes_does_not_end_what_ignores_it() -> None:
    """As ``nohup`` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for guard in (ending_on_signals(), exiting_on_signals()):
            with guard:
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
