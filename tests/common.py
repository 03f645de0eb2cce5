"""What tests of several folders share: normal numbers, and the summary of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fedraclora.binding import PlainDict
from fedraclora.compatibility import Features, refuse
from fedraclora.config.run_config import RunConfig, from_plain
from fedraclora.engines.base import Grid
from fedraclora.launch import run_shown
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.wire.answers import Came
from fedraclora.wire.exchange import Ask

# Arguments of a run that looks for no learning rate and no number of clients for a batch.
FIXED = ("local.lr=0.1", "engine.chunk=8")
# Arguments of a run of two rounds that takes about a second.
SMALL_RUN = [
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "partition=iid",
    "model.hidden=[6]",
    "method.rank=2",
    "clients=12",
    "clients_per_round=5",
    "rounds=2",
    "output=study",
]


def assemble(config: RunConfig, folder: Path | None, **more: Any) -> RunBuilder:
    """Build every part of a run."""
    return RunBuilder(config, folder, **more).ready()


def simulated(plain: PlainDict, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Run to the end; give the summary."""
    config = from_plain(plain, METHODS, resuming=resume)
    return run_shown(RunBuilder(config, folder, resume=resume)).summary


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


def accepted(group: str, part: Any) -> Any:
    """Give the settings of a group, or refuse them as a run does: conflicts, keys without effect.

    Raises:
        ConfigError: With all of them.
    """
    features = Features([part, *getattr(part, "added", ())])
    values = {f"{group}.{f.name}": (getattr(part, f.name), f.default) for f in fields(part)}
    refuse([*features.idle(values).values(), *features.conflicts()])
    return part
