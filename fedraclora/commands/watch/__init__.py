"""``fedraclora watch``: serve a live page of a run on this machine.

Other commands serve the page of their own run if they get ``watch=true`` (`watch_options`,
`watched`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from fedraclora.compose.words import part
from fedraclora.errors import ConfigError

WATCHED = ("simulate", "deploy", "tune", "compare")  # the commands that take `watch=true`
_PORT: ContextVar[int | None] = ContextVar("port", default=None)  # None: no page


@contextmanager
def watch_options(words: Sequence[str]) -> Iterator[list[str]]:
    """Remove ``watch=true`` and ``port=NUMBER`` from a command's arguments, for `watched`.

    Raises:
        ConfigError: If their values are invalid.
    """
    own, rest = part(words, ("watch", "port"))
    port = None
    if own:
        from fedraclora.commands.watch.server import port_of

        port = port_of({"watch": False, **own})
    token = _PORT.set(port)
    try:
        yield rest
    finally:
        _PORT.reset(token)


@contextmanager
def watched(folder: Path, *, sweep: bool = False) -> Iterator[None]:
    """Serve the page of a run while it runs, if the command has ``watch=true``.

    Args:
        folder: The run folder, which need not exist yet.
        sweep: Whether the run is a job of a sweep.

    Raises:
        ConfigError: If the run is a job of a sweep, or the port is in use.
    """
    if (port := _PORT.get()) is None:
        yield
        return
    if sweep:
        raise ConfigError(
            "watch=true shows one run: start the sweep without it, and follow it from another "
            "terminal by `fedraclora watch FOLDER`"
        )
    from fedraclora.commands.watch.server import serving

    with serving(folder, port):
        yield
