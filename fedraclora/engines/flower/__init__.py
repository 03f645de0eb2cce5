"""Flower's own runtimes, one node per client."""

from __future__ import annotations

from fedraclora.engines.flower.grid import FlowerGrid
from fedraclora.engines.flower.nodes import NodePerClient

__all__ = ["FlowerGrid", "NodePerClient"]
