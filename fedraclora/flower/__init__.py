"""Run low-rank rounds in your own Flower app: a strategy for the server, rounds for the clients.

ServerApp: ``strategy = fedraclora.flower.LowRank(method, model)``, in place of Flower's `FedAvg`.
ClientApp: ``with fedraclora.flower.round(message, context, model) as r`` around the training, and
``return r.reply({"num-examples": n})`` at its end.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedraclora.flower.arrays import load
    from fedraclora.flower.client import FlowerRound, round  # noqa: A004
    from fedraclora.flower.server import LowRank

__all__ = ["FlowerRound", "LowRank", "load", "round"]


def __getattr__(name: str) -> object:
    """Import a public name at its first use: Flower starts a process for every message."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where = {"LowRank": "server", "load": "arrays"}.get(name, "client")
    return getattr(import_module(f"fedraclora.flower.{where}"), name)
