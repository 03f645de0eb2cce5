"""``fedraclora watch``: a page on this machine that follows a run while it runs.

Other commands open it beside them if their arguments have ``watch=true`` (`watch_options`,
`watched`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from fedraclora.compose.words import part
from fedraclora.errors import ConfigError

ANY = 0  # a free port
WATCHED = ("simulate", "deploy", "tune", "compare")  # the commands that take `watch=true`
_PORT: ContextVar[int | None] = ContextVar("port", default=None)  # None: no page


def port_of(own: dict[str, object]) -> int:
    """Return the port that is asked for.

    Raises:
        ConfigError: If it is none.
    """
    port = own.get("port", ANY)
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 1 << 16:
        raise ConfigError(f"port={port}: a number from 1024 to 65535 is wanted; leave it out")
    return port


@contextmanager
def watch_options(words: Sequence[str]) -> Iterator[list[str]]:
    """Take ``watch=true`` and ``port=NUMBER`` from the arguments of a command, for `watched`.

    Raises:
        ConfigError: If they are something else.
    """
    own, rest = part(words, ("watch", "port"))
    if not isinstance(wanted := own.get("watch", False), bool):
        raise ConfigError(f"watch={wanted}: use true or false")
    token = _PORT.set(port_of(own) if wanted else None)
    try:
        yield rest
    finally:
        _PORT.reset(token)


@contextmanager
def watched(folder: Path, *, sweep: bool = False) -> Iterator[None]:
    """Serve the page of a folder inside, if the command was asked for it.

    Args:
        folder: Of the run, or what there will be of it.
        sweep: Whether it is one of several.

    Raises:
        ConfigError: If it is one of a sweep, or the port is taken.
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
