"""Wrap methods as new methods.

`allocated` chooses the adapted layers, or applies `pruned`, which cuts components; `dora` trains
the lengths of adapted rows.
"""

from __future__ import annotations

from functools import partial

from fedraclora.allocation import flows
from fedraclora.config.run_config import RunConfig
from fedraclora.data.task import Task
from fedraclora.protocol.method import Method
from fedraclora.strategies.wrappers.allocated import allocated
from fedraclora.strategies.wrappers.around import inside
from fedraclora.strategies.wrappers.dora import Dora

__all__ = ["inside", "method_of"]


def method_of(config: RunConfig, task: Task | None = None) -> Method:
    """Build the method of a run with its wrappers.

    Args:
        config: The config of the run.
        task: The task, whose model scores layers by SYNFLOW; not needed if no round is opened.
    """
    flow = None if task is None else partial(flows, task.model, task.test)
    method = allocated(config.method, config.allocation, flow)
    return Dora(method) if config.dora else method
