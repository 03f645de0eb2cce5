"""Fed-RAC-LoRA: federated fine-tuning by a sequence of merged random low-rank updates.

``fedraclora.simulate(...)`` runs a method on a task in this process and returns a `RunResult`;
``fedraclora.read_run(folder)`` reads one, ``fedraclora.compare(...)`` compares methods, and
``fedraclora.tune(...)`` finds settings. See `fedraclora.api`.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedraclora.api import (
        Callback,
        Metric,
        RoundStep,
        RunResult,
        TuningResult,
        read_run,
        simulate,
        tune,
    )
    from fedraclora.commands.compare.run import ComparisonResult, compare
    from fedraclora.compatibility import Feature
    from fedraclora.protocol.program import ClientProgram

__all__ = [
    "Callback",
    "ClientProgram",
    "ComparisonResult",
    "Feature",
    "Metric",
    "RoundStep",
    "RunResult",
    "TuningResult",
    "compare",
    "read_run",
    "simulate",
    "tune",
]

# Names that are not in `fedraclora.api`: those that a node of a deployment, which has no entry
# points, may import from here, and those of a command.
HOMES = {
    "Callback": "fedraclora.run.callback",
    "ClientProgram": "fedraclora.protocol.program",
    "ComparisonResult": "fedraclora.commands.compare.run",
    "Feature": "fedraclora.compatibility",
    "compare": "fedraclora.commands.compare.run",
    "RoundStep": "fedraclora.strategies.server.round_step",
}

# No data leave the machine unless the user says so. Flower and Ray read these when imported.
for _name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
    os.environ.setdefault(_name, "0")

# `strategies`, `clients`, `conf` and, in a checkout, `experiments` are beside this folder, which
# links to them. Flower's bundle has no links, and some file systems have none (docs/adr/0001).
if not Path(__file__).with_name("strategies").is_dir():
    __path__.append(str(Path(__file__).parents[1]))


def __getattr__(name: str) -> object:
    """Import a public name at its first use, so that importing this package costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES.get(name, "fedraclora.api")), name)
