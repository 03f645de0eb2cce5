"""Puts a run together, on the engine that its config names: see `strategies.assembly.assemble`."""

from __future__ import annotations

from functools import partial

from clients.engines import engine_of
from strategies import assembly
from strategies.assembly import Assembled

__all__ = ["Assembled", "assemble"]

assemble = partial(assembly.assemble, engine_of=engine_of)
