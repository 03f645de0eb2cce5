"""Load samples that a Python program has in memory: torch and Hugging Face datasets, arrays.

One *table* is ``(inputs, target)`` (arrays or tensors; inputs may be a dict of them), a
`torch.utils.data.Dataset` of pairs or of dicts, or a Hugging Face ``Dataset``. Clients are a list
of tables, one table with a column for the client, or one table that is divided.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fedraclora.binding import call_function
from fedraclora.data.dataset import (
    Column,
    DataSet,
    RowNumbers,
)
from fedraclora.data.encoders.array import (
    SampleSpec,
    describe_inputs,
    found_shape,
    outputs_for,
    scale_of_bytes,
)
from fedraclora.data.encoders.program import (
    column_of,
    divided_by,
    is_clients,
    is_columns,
    is_frame,
    listed_tables,
    named_classes,
    of_frame,
    table_of,
)
from fedraclora.data.encoders.table import TableForm
from fedraclora.data.entries import Entries, index_table, length, parts_of
from fedraclora.data.fingerprint import call_twice
from fedraclora.data.objective import (
    check_names,
    like_of_loss,
    objective_of,
    takes_whole,
    usual_metrics,
)
from fedraclora.data.own_loss import named_loss
from fedraclora.data.samples import Samples
from fedraclora.data.similar_names import check_similar
from fedraclora.data.split import TEST_FRACTION, hold_out_test, holdout_of
from fedraclora.errors import ConfigError, DataError
from fedraclora.limits import Count, Fraction, limited
from fedraclora.object_registry import object_digest, register_object, registered_object
from fedraclora.tree import digest


def data_of(
    data: object,
    *,
    model: object = None,
    test: Any = None,
    partitioner: Any = None,
    client: str | None = None,
    target: str | None = None,
    loss: str | Mapping[str, object] | None = None,
    metrics: Sequence[str | Mapping[str, object]] | None = None,
    classes: int | None = None,
    frame: Mapping[str, Any] | None = None,
    own: bool = False,
) -> DataSet:
    """Build a data set from the data of a program, or from the result of a user's function.

    Args:
        data: A list (or a dict, in its order) of tables, one for each client, or of such pairs as
            ``{"train": table, "test": table}``; or one table, which may be a frame of pandas.
        model: The module, or the name of its choice, which may determine the loss.
        test: A table to measure on; or the share of each client's samples to hold out, 0 for
            none; None: a fifth.
        partitioner: A partitioner of flwr-datasets, which divides a Hugging Face ``Dataset``.
        client: The column of a Hugging Face ``Dataset`` that names the client.
        target: The column to predict; None: ``label``, ``labels`` or ``target``.
        loss: A key of `fedraclora.data.task.LOSSES`; None: chosen by the model or the targets
            (`fedraclora.data.objective`).
        metrics: Names of metrics, the primary one first; None: those usual for the loss.
        classes: Number of outputs; None: derived from the targets.
        frame: How rows of a frame are read: fields of `TableForm`.
        own: Whether a user's function trains: then clients may have other objects than tables.

    Returns:
        The data set, which ``partition`` divides if it is not divided already.

    Raises:
        ConfigError: If two arguments contradict each other.
        DataError: If samples are invalid, naming the client.
    """
    loss, metrics = check_names(loss, metrics)
    share = TEST_FRACTION
    if is_share(test):
        share, test, frame = float(test), None, {**(frame or {}), "test_fraction": float(test)}
    if is_frame(data):
        how = TableForm(target, client, metrics=metrics, **(frame or {}))
        return of_frame(data, test, loss, how)
    brought = data
    if isinstance(data, Mapping) and is_clients(data):
        check_similar("data.client", map(str, data))
    data, tests = split_tests(data)
    objects = listed_tables(data)
    if own and not is_table(objects[0], target):
        held_out = None if test is None else table_of(test, "test", target)
        return unread(brought, held_out, partitioner, client, loss, metrics)
    names = [f"data, client {k}" for k in range(len(objects))] if is_clients(data) else ["data"]
    columns, given = owners_of(data, client), objects
    if columns:
        given = [data.remove_columns([client])]  # type: ignore[attr-defined]
    tables = [table_of(p, n, target) for p, n in zip(given, names, strict=True)]
    held_out = None if test is None else table_of(test, "test", target)
    loss, source = objective_of(loss, tables, model)
    own_tests = {k: table_of(t, f"data, client {k}, test", target) for k, t in tests.items()}
    seen = [*tables, *([] if held_out is None else [held_out]), *own_tests.values()]
    whole = takes_whole(model, seen)
    shape = () if whole else found_shape(tables[0])
    like = like_of_loss(loss)
    reads = like or loss
    form = SampleSpec(shape, reads, classes or outputs_for(seen, reads))
    names = names if len(tables) > 1 else ["data"]
    fitted = [form.validate(table, name) for table, name in zip(tables, names, strict=True)]
    table, sizes = stacked(fitted, names), [*map(len, fitted)]
    of_tests = [f"data, client {k}, test" for k in own_tests]
    own_tests = {
        k: form.validate(t, n) for (k, t), n in zip(own_tests.items(), of_tests, strict=True)
    }
    stacked([table.take(torch.arange(0)), *own_tests.values()], ["data", *of_tests])  # are alike
    found = DataSet(
        train=table,
        test=table.take(torch.arange(0)) if held_out is None else form.validate(held_out, "test"),
        classes=int(form.classes or 1),
        loss=loss,
        metrics=metrics or usual_metrics(loss, table.target),
        columns=columns | ({"label": table.target.numpy()} if reads == "cross_entropy" else {}),
        sample_shape=() if whole else found_shape(table),
        parts=parts_of_rows(data, sizes, partitioner),
        info={"source": "a Python program", "loss_from": source}
        | describe_inputs(tables[0], table),
        reading=({} if whole else scale_of_bytes(tables[0])) | named_classes(data, target),
        like=like,
        tests=[own_tests.get(k) for k in range(len(tables))] if own_tests else (),
        entries=Entries.of(objects, sizes),
    )
    return hold_out_test(found, share) if held_out is None and share else found


def split_tests(data: object) -> tuple[object, dict[int, Any]]:
    """Split the clients' entries into training samples and their own tests, by number.

    Raises:
        ConfigError: If it is one such pair instead of a list.
    """
    if not is_clients(data):
        return data, {}
    if parts_of(data)[1] is not None:
        raise ConfigError(
            "data has the keys train and test, which is the form of one client's entry. Give a "
            "list with one entry for each client, or the server's test samples as test=..."
        )
    pairs = [*map(parts_of, listed_tables(data))]
    tests = {k: test for k, (_, test) in enumerate(pairs) if test is not None}
    return ([train for train, _ in pairs] if tests else data), tests


def is_share(test: object) -> bool:
    """Check whether ``test`` is a share of samples to hold out.

    Raises:
        ConfigError: If it is a number, but no share.
    """
    if isinstance(test, bool) or (isinstance(test, int | float) and not 0 <= test < 1):
        raise ConfigError(
            f"test={test!r}: give test samples, or the share of each client's samples to hold "
            "out, in [0, 1). With 0 the server has no test samples."
        )
    return isinstance(test, int | float)


def register_data(found: DataSet) -> dict[str, object]:
    """Register a data set; return its config group."""
    digest = register_object(found, data_digest(found))
    return {"digest": digest, "loss": found.loss, "metrics": [*found.metrics]}


def registered_data(
    *,
    digest: str | None,
    loss: str | None = None,
    metrics: Sequence[str] | None = None,
    clients: int | None = None,
) -> DataSet:
    """Build a data set from one that the program has registered.

    Args:
        digest: The digest from `register_data`.
        loss: The loss with which it was registered, shown in the config; another one is refused.
        metrics: Like the loss.
        clients: Not used: the division determines it.

    Raises:
        ConfigError: If it is not registered, or with another loss or other metrics.
    """
    del clients
    found: DataSet = registered_object("data", digest)
    known = {"loss": found.loss, "metrics": [*found.metrics]}
    for key, asked in (("loss", loss), ("metrics", metrics)):
        if asked is not None and asked != known[key]:
            raise ConfigError(
                f"data.{key} is {asked}, but the data were handed in with {known[key]}: hand them "
                f"in again, as data=..., {key}=..."
            )
    return found


def owners_of(data: object, client: str | None) -> dict[str, Column]:
    """Return the column that names each row's client, if there is one."""
    if client is None:
        return {}
    if is_clients(data):
        raise ConfigError(
            "data is a list with one entry for each client, so it is divided already: leave "
            "client out"
        )
    if not is_columns(data):
        raise ConfigError(
            f"client={client!r} names a column, but data is a {type(data).__name__}. Give a "
            "table with columns, or a list with one entry for each client."
        )
    return {"client": np.asarray(column_of(data, client, "client"))}


def parts_of_rows(data: object, sizes: Sequence[int], partitioner: Any) -> list[RowNumbers] | None:
    """Return the rows of each client of a list, or of a partitioner; None if undivided."""
    if is_clients(data):
        return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return None if partitioner is None else divided_by(data, partitioner)


def is_table(found: object, target: str | None) -> bool:
    """Check whether samples are rows of numbers, or pairs that should be rows of numbers."""
    if isinstance(found, tuple | list | Samples):
        return True
    with suppress(DataError):
        table_of(found, "data", target)
        return True
    return False


def unread(
    data: object,
    held_out: Samples | None,
    partitioner: Any,
    client: str | None,
    loss: str | None,
    metrics: Sequence[str] | None,
) -> DataSet:
    """Keep objects that only a training function reads: texts, images, paths.

    They are divided by a table with one row per sample and no columns. The arguments are those of
    `data_of`; ``held_out`` is its converted ``test``.
    """
    if held_out is not None and loss is None:
        raise ConfigError(
            "test=... needs a loss, which cannot be guessed from these data: give loss=..."
        )
    objects = listed_tables(data)
    sizes = [*map(length, objects)]
    if not all(sizes):
        raise DataError(f"data, client {sizes.index(0)}: it has no samples. Give one or more.")
    loss = loss or "cross_entropy"
    classes = None if held_out is None else outputs_for([held_out], loss)
    if held_out is None:
        metrics, source = (), "none: there are no test samples"
    else:
        metrics, source = metrics or usual_metrics(loss, held_out.target), "said"
    return DataSet(
        train=index_table(sum(sizes)),
        test=index_table(0) if held_out is None else held_out,
        classes=int(classes or 1),
        loss=loss,
        metrics=tuple(metrics),
        columns={} if is_clients(data) else owners_of(data, client),
        sample_shape=(),
        parts=parts_of_rows(data, sizes, partitioner),
        info={
            "source": "objects of a Python program, which your training function reads",
            "loss_from": source,
        },
        entries=Entries.of(objects, sizes),
    )


def stacked(tables: Sequence[Samples], names: Sequence[str]) -> Samples:
    """Concatenate tables.

    Raises:
        DataError: If their inputs, or the shapes of inputs or targets, differ.
    """
    forms = [{n: tuple(t.shape[1:]) for n, t in table.tensors.items()} for table in tables]
    for form, name in zip(forms, names, strict=True):
        if form != forms[0]:
            raise DataError(
                f"{name}: inputs and target are {form}, but those of client 0 are {forms[0]}: "
                "give all clients the same"
            )
    return Samples.join(tables)


def data_digest(data: DataSet) -> str:
    """Hash samples and their division."""
    h = hashlib.sha256()
    for samples in (data.train, data.test):
        h.update(digest(samples.tensors).encode())
    for part in data.parts if isinstance(data.parts, list) else ():
        h.update(part.tobytes() + b"|")
    for name, values in data.columns.items():
        h.update(f"{name}|{values.tolist()}".encode())
    for client, own in enumerate(data.tests):
        h.update(f"test {client}|{None if own is None else digest(own.tensors)}".encode())
    if data.validation is not None:
        h.update(f"validation|{digest(data.validation.tensors)}".encode())
    for each in data.entries.objects if data.entries and not data.train.inputs else ():
        h.update(str(getattr(each, "_fingerprint", None) or object_digest(each)).encode())
    h.update(repr((data.loss, data.metrics, data.classes)).encode())
    return h.hexdigest()[:32]


@limited("data")
def load_function(
    *,
    function: str = "",
    parameters: Mapping[str, object] | None = None,
    test_fraction: Fraction | None = None,
    test_function: str | None = None,
    client: str | None = None,
    target: str | None = None,
    loss: str | Mapping[str, object] | None = None,
    metrics: Sequence[str | Mapping[str, object]] | None = None,
    classes: Count | None = None,
) -> DataSet:
    """Load the samples that a function of yours returns, in any form that Python accepts.

    Args:
        function: ``package.module:function``, which returns what `fedraclora.simulate` takes as
            its ``data``: a list of clients, or one table, which ``partition`` divides.
        parameters: Its arguments, by name.
        test_fraction: The fraction of each client's samples to hold out; None: 0.2 without
            ``test_function``; 0: the server has no sample.
        test_function: A function that returns the test samples, with the same arguments.
        client: The column that names the client, if it returns a table with columns.
        target: The column to predict; None: label, labels or target.
        loss: A key of `fedraclora.data.task.LOSSES`, or ``package.module:function``; a mapping of
            its name and its parameters. None: chosen by the targets.
        metrics: Metrics, the primary one first, in the same way; None: those usual for the loss.
        classes: Number of outputs; None: derived from the targets.

    Returns:
        The samples, read and checked.

    Raises:
        ConfigError: If a function does not exist, or does not accept the arguments.
        DataError: If samples are invalid.
    """

    def called(key: str, name: str) -> object:
        call = partial(call_function, key, name, parameters=parameters, at="data.parameters")
        return call_twice(f"{key}={name}", call)

    held = holdout_of(test_fraction, 0, test_function=test_function)
    found = data_of(
        called("data.function", function),
        test=called("data.test_function", str(test_function)) if held is None else held.fraction,
        client=client,
        target=target,
        loss=None if loss is None else named_loss(loss),
        metrics=None if metrics is None else [*map(named_loss, metrics)],
        classes=classes,
    )
    return replace(found, info=found.info | {"source": function})
