"""Samples that a function of the user's returns, in any form that a Python program takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedraclora.binding import call_function
from fedraclora.data.dataset import DataSet
from fedraclora.data.objects import data_of
from fedraclora.data.own_loss import named_loss
from fedraclora.limits import Count, limited


@limited("data")
def load_function(
    *,
    function: str = "",
    parameters: Mapping[str, object] | None = None,
    test: str | None = None,
    client: str | None = None,
    target: str | None = None,
    loss: str | Mapping[str, object] | None = None,
    metrics: Sequence[str | Mapping[str, object]] | None = None,
    classes: Count | None = None,
) -> DataSet:
    """Take the samples that a function of yours returns, in any form that Python takes.

    Args:
        function: ``package.module:function``, which returns what `fedraclora.simulate` takes as
            its ``data``: a list of clients, or one table, which ``partition`` divides.
        parameters: Its arguments, by name.
        test: What returns the samples to measure on, with the same arguments; None: a fifth of
            those of each client are held out.
        client: The column that says whose a row is, where it returns a table with columns.
        target: The column to predict; None: label, labels or target.
        loss: A key of `fedraclora.data.task.LOSSES`, or ``package.module:function``; a mapping of
            its name and its parameters. None: what the targets tell.
        metrics: Metrics, the headline first, in the same way; None: those usual for the loss.
        classes: Number of outputs; None: as the targets have.

    Returns:
        The samples, read and checked.

    Raises:
        ConfigError: If a function is not there, or does not take the arguments.
        DataError: If samples are not what they should be.
    """

    def called(key: str, name: str) -> object:
        return call_function(key, name, parameters=parameters, at="data.parameters")

    found = data_of(
        called("data.function", function),
        test=None if test is None else called("data.test", test),
        client=client,
        target=target,
        loss=None if loss is None else named_loss(loss),
        metrics=None if metrics is None else [*map(named_loss, metrics)],
        classes=classes,
    )
    return replace(found, info=found.info | {"source": function})
