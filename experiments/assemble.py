"""Puts a run together, on the engine that its config names: `strategies.assembly.assemble_with`."""

from __future__ import annotations

from functools import partial

from fedraclora.clients.engines import engine_of
from fedraclora.strategies import assembly
from fedraclora.strategies.assembly import Assembled

__all__ = ["Assembled", "assemble"]

assemble = partial(assembly.assemble_with, engine_of=engine_of)
