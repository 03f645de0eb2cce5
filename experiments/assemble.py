"""Puts a run together, on the engine that its config names: see `strategies.assembly.assemble`."""

from __future__ import annotations

from functools import partial

from fedraclora.clients.engines import engine_of
from fedraclora.strategies import assembly
from fedraclora.strategies.assembly import Assembled

__all__ = ["Assembled", "assemble"]

assemble = partial(assembly.assemble, engine_of=engine_of)
