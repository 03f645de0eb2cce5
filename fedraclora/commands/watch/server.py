"""The HTTP server of the live page, for local users who know its address.

It listens on the loopback interface, and serves only GET requests of a few fixed paths below a
random prefix: a run folder is private, but other users of this machine can reach the port. The Host
header must name this machine, against DNS rebinding by other websites. No requested path is used as
a file name.
"""

from __future__ import annotations

import json
import logging
import secrets
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le
from typing_extensions import override

from fedraclora.commands.watch.status import Watched
from fedraclora.errors import ConfigError
from fedraclora.schema import bound

log = logging.getLogger(__name__)
HOST = "127.0.0.1"
FREE_PORT = 0
NAMES = (HOST, "localhost")  # accepted host names of a request
FOLLOWED = 3.0  # seconds after a request in which a browser counts as connected
FETCHED = 0.5  # seconds for the browser to fetch the figures
LAST = 2.5  # seconds to wait for the last request of a connected browser
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
Answer = tuple[str, Callable[[], str]]  # content type, and a function of the content


def _port(*, port: Annotated[int, Ge(0), Le(65535)] = FREE_PORT, watch: bool = True) -> int | None:
    return port if watch else None


def port_of(own: Mapping[str, object]) -> int | None:
    """Check the keys ``watch`` and ``port``; return the port of the page, or None for no page."""
    return bound("", _port, own)()


class PageServer(ThreadingHTTPServer):
    """Serves the page of a folder.

    Args:
        folder: The folder of a run, several runs, a study or a tuning.
        port: A port of the loopback interface; 0 for a free one.

    Attributes:
        url: The address of the page.
        asked: Time of the last status request, by the monotonic clock.

    Raises:
        ConfigError: If the port is in use.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise ConfigError(
                f"port={port} cannot be used ({error}): name another one, or leave it out"
            ) from error
        self.watched, key = Watched(folder), secrets.token_urlsafe(12)
        self.port, self.asked = int(self.server_address[1]), 0.0
        self.url = f"http://{HOST}:{self.port}/{key}/"
        self.hosts = {f"{name}:{self.port}" for name in NAMES}
        self.answers: Mapping[str, Answer] = {
            f"/{key}/{name}": answer for name, answer in self._answers().items()
        }

    def _answers(self) -> dict[str, Answer]:
        from plotly.offline import get_plotlyjs

        from fedraclora.commands.report.page import rendered

        own = Path(__file__).with_name("watch.js")

        def status() -> str:
            self.asked = time.monotonic()
            return json.dumps(self.watched.status())

        return {
            "": ("text/html", partial(rendered, "watch/watch.html.j2")),
            "watch.js": ("text/javascript", partial(own.read_text, encoding="utf-8")),
            "plotly.js": ("text/javascript", get_plotlyjs),
            "status.json": ("application/json", status),
            "figures.json": ("application/json", self.watched.figures),
        }

    @override
    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer would look this machine up in DNS
        self.server_name, self.server_port = HOST, self.server_address[1]

    @override
    def handle_error(self, request: object, client_address: object) -> None:
        """Log an error of a request, unless the browser closed the connection."""
        if not isinstance(error := sys.exception(), ConnectionError | TimeoutError):
            log.warning("the page could not be served: %r", error, exc_info=error)


class Handler(BaseHTTPRequestHandler):
    """Handles GET requests; http.server rejects other methods."""

    server: PageServer
    server_version, sys_version = "fedraclora", ""
    timeout = 10

    def do_GET(self) -> None:
        """Send the content of one of the fixed paths."""
        if self.headers.get_all("Host") not in [[host] for host in self.server.hosts]:
            self.send_error(HTTPStatus.FORBIDDEN, "This page is for this machine alone")
            return
        if (answer := self.server.answers.get(self.path)) is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, make = answer
        body = make().encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    @override
    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the terminal shows the run's progress."""


@contextmanager
def serving(folder: Path, port: int) -> Iterator[PageServer]:
    """Serve a page in a thread; at the end, let a connected browser fetch the final state."""
    with PageServer(folder, port) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        print(f"watch it at {server.url}", file=sys.stderr, flush=True)
        try:
            yield server
        finally:
            ended = time.monotonic()
            if server.asked > ended - FOLLOWED:
                while server.asked < ended and time.monotonic() < ended + LAST:
                    time.sleep(0.05)
                time.sleep(FETCHED)
            server.shutdown()
