"""The work that every peer does, as `fedraclora.experiments.bench.launch` wrote it down."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedraclora.experiments.bench.usage import Laps, tree_peak

if TYPE_CHECKING:
    import torch


class Work:
    """Data, initial weights and settings, read where ``BENCH_WORK`` says."""

    def __init__(self) -> None:
        settings = json.loads(Path(os.environ["BENCH_WORK"]).read_text())
        self.paths: dict[str, str] = settings["paths"]
        self.rounds: int = settings["rounds"]
        self.batch: int = settings["batch"]
        self.lr: float = settings["lr"]
        self.threads: int = settings["threads"]
        with np.load(self.paths["data"]) as stored:
            self.x = np.array(stored["x"])  # float32 [clients, samples, width]
            self.y = np.array(stored["y"])  # int64 [clients, samples]

    @property
    def clients(self) -> int:
        """Clients, all of them in each round."""
        return len(self.x)

    @property
    def samples(self) -> int:
        """Samples of each client."""
        return int(self.x.shape[1])

    @cached_property
    def start(self) -> dict[str, np.ndarray[Any, Any]]:
        """Initial weights by name."""
        with np.load(self.paths["start"]) as stored:
            return {name: np.array(stored[name]) for name in stored.files}

    def network(self) -> torch.nn.Module:
        """Build the two-layer perceptron, as a user's code would: torch initializes it."""
        from collections import OrderedDict

        import torch

        hidden, width = self.start["fc1.weight"].shape
        layers = OrderedDict(
            fc1=torch.nn.Linear(width, hidden),
            relu1=torch.nn.ReLU(),
            fc2=torch.nn.Linear(hidden, len(self.start["fc2.weight"])),
        )
        return torch.nn.Sequential(layers)

    def started(self) -> torch.nn.Module:
        """Build it with the initial weights of the work."""
        import torch

        model = self.network()
        model.load_state_dict({n: torch.from_numpy(w.copy()) for n, w in self.start.items()})
        return model

    def train(self, model: torch.nn.Module, client: int) -> None:
        """Train one client in place: an epoch of plain SGD, batches in order."""
        import torch

        x, y = torch.from_numpy(self.x[client]), torch.from_numpy(self.y[client])
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr)
        for first in range(0, len(x), self.batch):
            place = slice(first, first + self.batch)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[place]), y[place]).backward()
            optimizer.step()

    def report(self, laps: Laps, weights: Mapping[str, Any], *packages: str) -> None:
        """Write what was found: seconds, memory, versions, final weights."""
        final: dict[str, Any] = {n: np.asarray(w) for n, w in weights.items()}
        np.savez(self.paths["final"], **final)
        found = {
            "wall": laps.wall,
            "cpu": laps.cpu,
            "peak": tree_peak(),
            "versions": {p: version(p) for p in packages},
        }
        Path(self.paths["outcome"]).write_text(json.dumps(found))
