"""The ClientApp: a thin shell around a `Worker`."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedraclora.clients.worker import Worker


def make_client_app(worker: Worker) -> ClientApp:
    """Make the ClientApp that trains with ``worker``; it serves every method.

    Args:
        worker: Trains the clients that a message names.

    Returns:
        An app with the handler ``train.cohort``.
    """
    app = ClientApp()

    @app.train("cohort")
    def train(message: Message, _context: Context) -> Message:
        # Nothing is kept in Flower's state: it is lost when a client raises.
        return Message(worker.train(message.content), reply_to=message)

    return app
