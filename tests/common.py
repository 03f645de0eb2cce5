"""What tests of several folders share: normal numbers, and the summary of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedraclora.clients.engines import engine_of
from fedraclora.engines.base import Grid
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.assembly import assemble_with
from fedraclora.wire.exchange import Ask, Came

# A run put together, on the engine that its config names.
assemble = partial(assemble_with, engine_of=engine_of)


def normal(*shape: int, seed: int = 0, key: str | int = "x") -> torch.Tensor:
    """Draw float64 normals; other numbers for another shape, seed or key."""
    return torch_normal(generator(seed, key, *shape), *shape)


def summary_of(folder: Path) -> dict[str, Any]:
    """Read the summary of a run."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


Arrange = Callable[[list[Any]], Iterable[Any]]  # of asks with their answers


def arranged(grid: Grid, arrange: Arrange) -> None:
    """Change what comes from a grid, or its order."""
    ask = grid.ask

    def changed(asks: Sequence[Ask], timeout: float | None = None) -> Came:
        return arrange([*ask(asks, timeout)])

    grid.ask = changed  # type: ignore[method-assign]
