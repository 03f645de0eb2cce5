"""What tests of several folders share: normal numbers, and the summary of a run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedraclora.clients.engines import engine_of
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.assembly import assemble_with

# A run put together, on the engine that its config names.
assemble = partial(assemble_with, engine_of=engine_of)


def normal(*shape: int, seed: int = 0, key: str | int = "x") -> torch.Tensor:
    """Draw float64 normals; other numbers for another shape, seed or key."""
    return torch_normal(generator(seed, key, *shape), *shape)


def summary_of(folder: Path) -> dict[str, Any]:
    """Read the summary of a run."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found
