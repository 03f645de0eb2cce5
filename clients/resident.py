"""The process that stays on a node between messages, with torch, model, data and weights.

``python -m clients.resident LISTENER NODE KEY``: started by `clients.handover` with a socket that
listens and a handle of the process that it must not outlive, both by number. It ends with that
process, when a message of another run comes, and when none has come for `IDLE` seconds; and while
it has a message, with the process that brought it. It may be killed at any time.
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
from multiprocessing.connection import Connection

from flwr.app import Context, Message

from clients.handover import GONE, READY, check_peer
from fedraclora.errors import ClientError

log = logging.getLogger(__name__)

IDLE = 600.0  # seconds without a message, after which memory is more use to others

Respond = Callable[[Message, Context], Message]


def serve(listener: socket.socket, node: int, key: bytes, respond: Respond) -> None:
    """Answer one message after another, until it is time to end.

    Args:
        listener: Where messages come.
        node: Handle of the process that this one must not outlive (`os.pidfd_open`).
        key: Of the run.
        respond: Answers a message.
    """
    while True:
        ready, _, _ = select.select([listener.fileno(), node], [], [], IDLE)
        if ready != [listener.fileno()]:
            return
        link, _ = listener.accept()
        with link:
            try:
                check_peer(link)
            except ClientError as error:
                log.warning("%s", error)
                continue
            peer = Connection(link.detach())
        with peer:
            try:
                if peer.recv_bytes() != key:
                    return
                peer.send_bytes(READY)
                answer(peer, node, respond)
            except GONE:
                log.warning("a process of this node went away before it had its answer")


def answer(peer: Connection, node: int, respond: Respond) -> None:
    """Answer a message; if its process or the node's ends meanwhile, this one does, too."""
    message, context = peer.recv()
    answered = threading.Event()

    def end_with_them() -> None:
        poll = select.poll()
        poll.register(node, select.POLLIN)
        poll.register(peer.fileno(), select.POLLRDHUP)
        poll.poll()
        if not answered.is_set():
            os._exit(1)

    watch = threading.Thread(target=end_with_them, daemon=True)
    watch.start()
    reply = respond(message, context)
    answered.set()
    peer.send(reply)
    watch.join()  # until it has been read: then the other end is closed


def main() -> None:
    """Serve what the command line names."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the whole group of the node
    from clients.respond import respond

    listener, node, key = sys.argv[1:]
    serve(socket.socket(fileno=int(listener)), int(node), key.encode(), respond)


if __name__ == "__main__":
    main()
