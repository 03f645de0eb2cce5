"""Ways in which a run stops before its end."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from fedraclora.clients.worker import Worker
from fedraclora.errors import ClientError, ConfigError
from fedraclora.run.recorder import RunRecorder

AT = 3  # the round in which a run stops: there is a checkpoint of round 2


class Killed(BaseException):
    """Ends a run as SIGKILL would: no handler of errors sees it."""


@dataclass
class Reaper:
    """Ends a run at the n-th call that changes the disk.

    Attributes:
        at: Number of the call, from 1; 0 never kills.
        torn: End it in the middle of the call, half of the bytes written; else before it.
        calls: What has been called.
    """

    at: int = 0
    torn: bool = False
    calls: list[str] = field(default_factory=list)
    dead: bool = False

    def watch(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(first: Any, *rest: Any, **named: Any) -> Any:
            if self.dead and name == "open":
                raise OSError("a killed process opens nothing")
            if self.dead:
                return None  # and cleans nothing up
            target = Path(str(rest[0])) if name == "save_file" else first
            if name == "open" and rest[:1] != ("ab",):
                return call(first, *rest, **named)
            self.calls.append(f"{name} {getattr(target, 'name', '')}".strip())
            if len(self.calls) == self.at:
                if self.torn:
                    tear(name, target, lambda: call(first, *rest, **named))
                self.dead = True
                raise Killed
            return call(first, *rest, **named)

        return watched


def tear(name: str, target: Any, call: Callable[[], object]) -> None:
    """Do half of a call."""
    if name == "fsync" and isinstance(target, int):
        target = Path(f"/proc/self/fd/{target}").resolve()
        if target.name == "ledger.jsonl":
            os.truncate(target, target.stat().st_size - 20)
    elif name in {"write_text", "write_bytes", "save_file"}:
        call()
        os.truncate(target, target.stat().st_size // 2)


@contextmanager
def reaping(reaper: Reaper) -> Iterator[None]:
    """Let every call that changes the disk pass by the reaper."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "write_text", "write_bytes", "replace", "unlink", "open"):
            patch.setattr(Path, name, reaper.watch(name, getattr(Path, name)))
        # Nothing is flushed in earnest: that is most of the time of a run this small.
        patch.setattr(os, "fsync", reaper.watch("fsync", lambda _: None))
        patch.setattr("fedraclora.weights.files.save_file", reaper.watch("save_file", save_file))
        yield


Go = Callable[[], object]  # begins the run, or resumes it
Stop = Callable[[Go, int], None]  # the same, and stops it; with the calls that change the disk


def fails(go: Go, place: tuple[object, str], call: Callable[..., Any], error: Any) -> None:
    """Run with a function replaced, which ends the run with an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place, call)
        with error:
            go()


def interrupted(go: Go, calls: int) -> None:
    """Ctrl-C, while clients train."""

    def press(self: Worker, ask: Any) -> Any:
        if ask.request.round_ == AT:
            signal.raise_signal(signal.SIGINT)
        return answer(self, ask)

    answer = Worker.train
    fails(go, (Worker, "train"), press, pytest.raises(KeyboardInterrupt))


def a_client_fails(go: Go, calls: int) -> None:
    """The training of all clients of a round raises."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such sample")

    def fail(self: Worker, ask: Any) -> Any:
        if ask.request.round_ == AT:
            self.trainer.train = broken  # type: ignore[method-assign,assignment]
        return answer(self, ask)

    answer = Worker.train
    fails(go, (Worker, "train"), fail, pytest.raises(ClientError, match="no such sample"))


def the_server_fails(go: Go, calls: int) -> None:
    """The server raises between the chain and the ledger."""

    def fail(self: RunRecorder, round_: int, state: Any) -> None:
        link(self, round_, state)
        if round_ == AT:
            raise ArithmeticError("of the server")

    link = RunRecorder.link
    fails(go, (RunRecorder, "link"), fail, pytest.raises(ArithmeticError, match="server"))


def the_disk_is_full(go: Go, calls: int) -> None:
    """From the middle of the run on nothing can be flushed."""
    seen = []

    def full(handle: int) -> None:
        seen.append(handle)
        if len(seen) > calls // 4:  # a quarter of what changes the disk are flushes
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    raised = pytest.raises((OSError, ConfigError), match="No space left")
    fails(go, (os, "fsync"), full, raised)


def killed(go: Go, *, at: int, torn: bool) -> None:
    with reaping(Reaper(at, torn)), pytest.raises(Killed):
        go()


def killed_before_a_write(go: Go, calls: int) -> None:
    killed(go, at=calls * 2 // 3, torn=False)


def killed_in_a_write(go: Go, calls: int) -> None:
    killed(go, at=calls * 3 // 4, torn=True)


def killed_twice(go: Go, calls: int) -> None:
    """As it begins, and before it has come any further."""
    killed(go, at=calls // 2, torn=True)
    killed(go, at=3, torn=False)


STOPS: list[Stop] = [
    interrupted,
    a_client_fails,
    the_server_fails,
    the_disk_is_full,
    killed_before_a_write,
    killed_in_a_write,
    killed_twice,
]
