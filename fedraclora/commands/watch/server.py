"""The server of the page: on this machine alone, and for whoever has its address.

It listens on the loopback interface, and answers nothing but GET of a few fixed paths, below one
that is drawn at random: a run folder is private, and other users of this machine can reach the
port. A request must name this machine as its host, so that no other site's page can read it by
having its own name lead here (DNS rebinding). No path of a request reaches the file system.
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

from typing_extensions import override

from fedraclora.commands.watch.status import Watched
from fedraclora.errors import ConfigError

log = logging.getLogger(__name__)
HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # of this machine, in a request
FOLLOWED = 3.0  # seconds since a page has asked, within which somebody looks at it
FETCHED = 0.5  # seconds until it has the figures, too
LAST = 2.5  # seconds that such a page has to ask for the last time
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
Answer = tuple[str, Callable[[], str]]  # type of content, and what makes it


class PageServer(ThreadingHTTPServer):
    """Serves the page of a folder.

    Args:
        folder: Of a run, of several, or of a tuning.
        port: On the loopback interface; 0: one that is free.

    Attributes:
        url: The address of the page.
        asked: When its state was asked for last, by the monotonic clock.

    Raises:
        ConfigError: If the port is taken.
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
        socketserver.TCPServer.server_bind(self)  # without a look-up of this machine's name
        self.server_name, self.server_port = HOST, self.server_address[1]

    @override
    def handle_error(self, request: object, client_address: object) -> None:
        """Log what went wrong with an answer, but that its reader went away."""
        if not isinstance(error := sys.exception(), ConnectionError | TimeoutError):
            log.warning("the page could not be served: %r", error, exc_info=error)


class Handler(BaseHTTPRequestHandler):
    """Answers GET alone; http.server refuses other methods."""

    server: PageServer
    server_version, sys_version = "fedraclora", ""
    timeout = 10

    def do_GET(self) -> None:
        """Answer one of the fixed paths."""
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
        """Print nothing: the terminal shows the run."""


@contextmanager
def serving(folder: Path, port: int) -> Iterator[PageServer]:
    """Serve a page in a thread, and say where. A page that is looked at sees the end, too."""
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
