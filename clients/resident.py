"""Run the resident process of a node, which keeps torch, model, data and weights in memory.

``python -m fedraclora.clients.resident LISTENER NODE KEY``: `clients.handover` starts it with a
listening socket and a handle of the process with which it must end, both by number. It also ends at
a message of another run, or after `IDLE` seconds without a message. While it processes a message,
it ends with the process that brought it, to which it sends a heartbeat every `BEAT` seconds. It may
be killed at any time.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

from flwr.app import Context, Message

from fedraclora.clients.handover import GONE, READY, SILENCE, check_peer, limit
from fedraclora.errors import ClientError

log = logging.getLogger(__name__)

BEAT = 5.0
GREETING = 10.0  # seconds for a connection to name its run
LONGEST = 1 << 13  # bytes of that: a number and a path
IDLE = 600.0  # seconds without a message after which its memory is released

Respond = Callable[[Message, Context], Message]


def serve(listener: socket.socket, node: int, key: bytes, respond: Respond) -> None:
    """Answer messages until the process should end.

    Args:
        listener: The listening socket.
        node: Handle of the process with which this one ends (`os.pidfd_open`).
        key: The key of the run.
        respond: Answers a message.
    """
    while True:
        ready, _, _ = select.select([listener.fileno(), node], [], [], IDLE)
        if ready != [listener.fileno()]:
            return
        link, _ = listener.accept()
        with link, Connection(os.dup(link.fileno())) as peer:
            try:
                check_peer(link)
                limit(link, GREETING)
                if peer.recv_bytes(LONGEST) != key:
                    return
                limit(link, SILENCE)
                peer.send_bytes(READY)
                answer(peer, node, respond)
            except ClientError as error:
                log.warning("%s", error)
            except GONE:
                log.warning("a process of this node disconnected before it got its answer")
            except BlockingIOError:
                log.warning("a process of this node connected but sent no message")
            except Exception as error:  # bytes of any kind
                kind = type(error).__name__
                log.warning("cannot read or answer a message (%s: %s)", kind, error)


def answer(peer: Connection, node: int, respond: Respond) -> None:
    """Answer a message; exit if the sending process or the node's process ends meanwhile."""
    message, context = peer.recv()
    answered, speaking = threading.Event(), threading.Lock()

    def end_with_them() -> None:
        poll = select.poll()
        poll.register(node, select.POLLIN)
        poll.register(peer.fileno(), select.POLLRDHUP)
        with suppress(OSError):  # no process reads any more
            while not poll.poll(BEAT * 1000):
                with speaking:
                    if not answered.is_set():
                        peer.send(None)
        if not answered.is_set():
            os._exit(1)

    watch = threading.Thread(target=end_with_them, daemon=True)
    watch.start()
    reply = respond(message, context)
    with speaking:
        answered.set()
    peer.send(reply)
    watch.join(SILENCE)  # wait until it was read: then the other end is closed


def main() -> None:
    """Run the resident process from its command line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C goes to the whole group of the node
    from fedraclora.clients.respond import respond

    listener, node, key = sys.argv[1:]
    serve(socket.socket(fileno=int(listener)), int(node), key.encode(), respond)


if __name__ == "__main__":
    main()
