"""``fedraclora watch RUN``: serve the page of a run, several runs, a study or a tuning."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedraclora.commands.watch.server import FREE_PORT, PageServer, port_of
from fedraclora.compose.words import part
from fedraclora.errors import CheckpointError


def main(words: Sequence[str]) -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="fedraclora watch",
        description="Follow a run, a deployment, a sweep or a tuning on a page of this machine.",
        epilog="port=NUMBER: where it is served on 127.0.0.1 (default: a free port). It only "
        "reads, and Ctrl-C ends it. On another host: ssh -L NUMBER:127.0.0.1:NUMBER HOST.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or one with runs")
    own, rest = part(words, ("port",))
    folder = parser.parse_args(rest).run.expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"there is no run folder {folder}; give the output.dir of a run")
    port = port_of(own)
    with PageServer(folder, port or FREE_PORT) as server, suppress(KeyboardInterrupt):
        print(f"{folder} is shown at {server.url} (Ctrl-C ends that)", flush=True)
        server.serve_forever(0.1)
