"""Fed-RAC-LoRA: federated fine-tuning by a chain of randomised low-rank links.

``fedraclora.simulate(...)`` runs a method on a task in this process and gives a `Run`;
``fedraclora.read_run(folder)`` reads one. See `experiments.api`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.api import Run, read_run, simulate

__all__ = ["Run", "read_run", "simulate"]

# Nothing leaves the machine unless its user says so. Flower and Ray read these when imported.
for _name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
    os.environ.setdefault(_name, "0")


def __getattr__(name: str) -> object:
    """Fetch what is public when it is used first: to import this package must cost nothing.

    The core stands below all else, and its name is what users import. So this one module may look
    up, and only here; `pyproject.toml` says so in each contract of imports.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from experiments import api

    return getattr(api, name)
