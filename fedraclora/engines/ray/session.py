"""Start a private Ray in this process that others cannot reach, and end it in order."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import ray
from ray._private import ray_constants, utils
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from fedraclora.engines.private_ray import RayFolder, put_back
from fedraclora.errors import EngineError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class RaySession:
    """Make a Ray that this process starts private while this is open; see `private_ray`.

    Raises:
        EngineError: If a Ray runs in this process already.
    """

    def __init__(self) -> None:
        if ray.is_initialized():
            raise EngineError(
                "this process runs Ray already. End that Ray (ray.shutdown()) "
                "before you start a run"
            )
        self._environ, self._clusters = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
        self._folder = RayFolder()
        os.environ.update(self._folder.environ)
        self._read_environment(clusters=False)
        atexit.register(self.close)  # if it was not closed before

    def close(self) -> None:
        """End the Ray of this session, and restore the environment."""
        atexit.unregister(self.close)
        try:
            with own_sigterm():
                ray.shutdown()
        finally:
            self._folder.close()
            put_back(self._environ)
            self._read_environment(clusters=self._clusters)

    def _read_environment(self, *, clusters: bool) -> None:
        """Make Ray read its environment again, which it reads once at import or first use."""
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def refuse_open_ray() -> None:
    """Reject a Ray of this process that other machines can reach.

    Raises:
        EngineError: If it listens at other addresses than this machine's own.
    """
    address = ray.get_runtime_context().gcs_address
    if address.rpartition(":")[0].strip("[]") not in LOOPBACK:
        raise EngineError(
            f"Ray {ray.__version__} listens at {address}, which other machines can reach, "
            "although it was told to listen at 127.0.0.1 only. Install the version of Ray "
            "that Flower requires (pip install 'flwr[simulation]')"
        )


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Keep Ray from handling SIGTERM while it starts or ends; delay interrupts until then.

    When it starts, Ray installs a handler in Python, which exits with status 15, and one outside of
    Python, which aborts the process three seconds later. When it ends, it leaves the signal without
    a handler. And if an exception interrupts its start, its end crashes; during an import Python
    even drops the exception.

    Raises:
        KeyboardInterrupt: After SIGTERM, SIGHUP or Ctrl-C; at once if one is repeated.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers cannot be set here
        yield
        return
    came = []

    def wait(number: int, _frame: FrameType | None) -> None:
        signal.alarm(0)
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    asked, before = utils.set_sigterm_handler, signal.signal(signal.SIGTERM, wait)
    others = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    others = {n: handler for n, handler in others.items() if callable(handler)}  # that are heard
    for number in others:
        signal.signal(number, wait)
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = asked
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        for number, handler in others.items():
            signal.signal(number, handler)
        if came:
            raise KeyboardInterrupt
