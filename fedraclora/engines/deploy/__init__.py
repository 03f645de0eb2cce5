"""Real SuperLinks and SuperNodes."""

from __future__ import annotations

from fedraclora.engines.deploy.grid import DeployGrid
from fedraclora.engines.deploy.traffic import Traffic, taken_traffic

__all__ = ["DeployGrid", "Traffic", "taken_traffic"]
