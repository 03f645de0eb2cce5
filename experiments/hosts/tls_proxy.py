"""A proxy before a SuperLink, as nginx is: it shows nodes a certificate of its own.

    python -m fedraclora.experiments.hosts.tls_proxy PORT SUPERLINK_PORT FOLDER

FOLDER has the files of docs/deploy/certificates.sh. A SIGHUP has it read ``server.pem`` again, for
new connections; those that are open stay.
"""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

PIECE = 1 << 16  # bytes


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy bytes until one end closes."""
    with suppress(OSError, ssl.SSLError):
        while piece := await reader.read(PIECE):
            writer.write(piece)
            await writer.drain()
    writer.close()


async def serve(port: int, superlink: int, folder: Path) -> None:
    """Forward connections to a SuperLink of this host."""
    shown = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trusted = ssl.create_default_context(cafile=str(folder / "ca.crt"))

    def read() -> None:
        shown.load_cert_chain(folder / "server.pem", folder / "server.key")

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection(
                "127.0.0.1", superlink, ssl=trusted, server_hostname="localhost"
            )
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    read()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, read)
    server = await asyncio.start_server(forward, "0.0.0.0", port, ssl=shown)
    await server.serve_forever()


def main(words: Sequence[str]) -> None:
    """Serve until this process is ended."""
    port, superlink, folder = words
    asyncio.run(serve(int(port), int(superlink), Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
