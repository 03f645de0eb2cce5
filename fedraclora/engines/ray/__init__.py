"""Run chunks of clients on resident Ray workers, on one machine or a cluster."""

from __future__ import annotations

from fedraclora.engines.ray.cluster import Cluster
from fedraclora.engines.ray.grid import RayGrid, WorkerStateLike

__all__ = ["Cluster", "RayGrid", "WorkerStateLike"]
