"""Real SuperLinks and SuperNodes."""

from __future__ import annotations

from fedraclora.engines.deploy.grid import DeployGrid, look_again_soon
from fedraclora.engines.deploy.traffic import Traffic, taken_traffic, traffic_of

__all__ = ["DeployGrid", "Traffic", "look_again_soon", "taken_traffic", "traffic_of"]
