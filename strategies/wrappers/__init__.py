"""Wrap methods as new methods.

`allocated` chooses the adapted layers, or applies `pruned`, which cuts components; `dora` trains
the lengths of adapted rows.
"""

from __future__ import annotations

from functools import partial

from fedraclora.allocation import flows
from fedraclora.config.run_config import RunConfig
from fedraclora.data.task import Task
from fedraclora.errors import ConfigError
from fedraclora.protocol.method import Method
from fedraclora.strategies.wrappers.allocated import allocated
from fedraclora.strategies.wrappers.dora import Dora


def method_of(config: RunConfig, task: Task | None = None) -> Method:
    """Build the method of a run with its wrappers.

    Args:
        config: The config of the run.
        task: The task, whose model scores layers by SYNFLOW; not needed if no round is opened.

    Raises:
        ConfigError: If they are incompatible.
    """
    taken, sent = config.local.steps, config.method.most_steps  # of scalars
    if taken is not None and sent is not None and taken < sent:
        raise ConfigError(
            f"local.steps={taken}: clients of this method send one number for each of {sent} "
            f"steps, so the rest would be zeros. Set local.steps=null, or at least {sent}"
        )
    flow = None if task is None else partial(flows, task.model, task.test)
    method = allocated(config.method, config.allocation, flow)
    return Dora(method) if config.dora else method
