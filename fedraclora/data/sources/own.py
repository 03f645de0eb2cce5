"""Describe the clients' own samples as a data set: their form, and the test samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Annotated

import numpy as np
import torch

from fedraclora.binding import call_function
from fedraclora.compatibility import Feature
from fedraclora.data.dataset import FROM_CLIENTS, OF_RUN, Clients, DataSet
from fedraclora.data.encoders.array import (
    SampleSpec,
    found_shape,
    gathered,
    read_npz,
    scale_of_bytes,
)
from fedraclora.data.entries import index_table
from fedraclora.data.fingerprint import call_twice
from fedraclora.data.locate import user_path
from fedraclora.data.objective import has_classes, like_of_loss, usual_metrics
from fedraclora.data.own_loss import IGNORED_TOKEN, named_loss
from fedraclora.data.partition import SIZES_SEEN, spread_clients
from fedraclora.data.per_client import PARAMETERS, PerClientSource, counted
from fedraclora.data.samples import Samples
from fedraclora.data.split import NO_HOLDOUT, Holdout, holdout_of
from fedraclora.data.task import read_as
from fedraclora.errors import ConfigError, DataError, FedRacLoraError
from fedraclora.limits import Count, Fraction, Part, limited
from fedraclora.trust import is_function

OF_A_NODE = Part("node")  # keys that a node sets, and no choice lists


@FROM_CLIENTS
@Feature(
    "data=own",
    instead="data that the server has",
    avoids={
        "pretraining": "the server has no samples to train on",
        "data.validation": "the server has no samples to hold out",
    },
)
@Feature("data.objects=true", instead="data.objects=false").where(lambda it: it["objects"])
@Feature(
    "samples that are tensors",
    take="data.objects=false (objects are not evaluated)",
    reads=("data.test_file", "data.test_function", "data.test_fraction"),
).where(lambda it: not it["objects"])
@Feature(
    "a function that gets samples",
    take="a function as data.samples or data.test_function",
    reads=("data.parameters",),
).where(lambda it: it["samples"] is None or is_function(it["samples"]) or it["test_function"])
@limited("data")
def own_samples(
    *,
    clients: Annotated[Clients | None, OF_RUN],
    classes: Count | None = None,
    shape: Sequence[int] | None = None,
    samples: str | None = None,
    parameters: Mapping[str, object] | None = None,
    test_file: str | None = None,
    test_function: str | None = None,
    test_fraction: Fraction | None = None,
    split_seed: int = 0,
    served: Annotated[Sequence[int] | None, OF_A_NODE] = None,
    objects: bool = False,
    loss: str | Mapping[str, object] = "cross_entropy",
    metrics: Sequence[str | Mapping[str, object]] | None = None,
) -> DataSet:
    """Describe the clients' own samples, which are also the division.

    Args:
        clients: Number of clients; None: as many as the folder ``samples`` has files.
        classes: Number of outputs: classes, or 1 for a scalar; None: derived from the samples.
        shape: Shape of one input ``"x"``; empty for token ids; None: derived from the samples.
        samples: The clients' samples: a folder or ``package.module:function``. A node sets it in
            its own configuration; in a simulation it has the samples of every client.
        parameters: Arguments of the functions ``samples`` and ``test_function``, by name.
        test_file: The server's test samples: a ``.npz`` file.
        test_function: The same: ``package.module:function``, which returns them.
        test_fraction: Without these, the fraction of each client's samples to hold out for the
            test; 0: the server has no sample; None: 0.2, or 0 if the server cannot read them.
        split_seed: Seed of that split.
        served: Set by a node: its clients. Nothing is measured there.
        objects: Whether the function ``samples`` returns objects that only ``local.train`` reads
            (texts, images, paths): then nothing is measured.
        loss: A key of `fedraclora.data.task.LOSSES`, or ``package.module:function``; a mapping of
            that as its ``name``, and parameters.
        metrics: Metrics, the primary one first, in the same way; None for those usual for the loss.

    Returns:
        Floating numbers in float32. The clients are `parts` that are read on demand, without a
        training table; at a node there is no test table either.

    Raises:
        ConfigError: If a key is wrong or missing.
        DataError: If samples are missing, or not what they should be.
    """
    loss = named_loss(loss)
    like = like_of_loss(loss)
    form = SampleSpec(None if shape is None else tuple(shape), like or loss, classes)
    named = {"test_file": test_file, "test_function": test_function}
    holdout, arguments = _holdout(named, test_fraction, split_seed, samples), parameters or {}
    count = counted(samples, clients)
    if objects:
        if samples is not None and not is_function(samples):
            raise ConfigError(
                f"data.samples={samples}, but data.objects=true needs a function (module:function)"
            )
        clients_data = PerClientSource(
            samples, count, form, served, parameters=arguments, objects=True
        )
        info: dict[str, object] = {"source": "each client's own", "loss_from": "nobody measures"}
        nothing = index_table(0)
        return DataSet(nothing, nothing, 1, loss, (), {}, (), clients_data, info=info)
    clients_data = PerClientSource(samples, count, form, served, holdout, arguments)
    if served is None:
        clients_data, measured = _measured(clients_data, test_file, test_function)
        form = clients_data.spec
    elif classes is None:
        raise ConfigError(
            "data.classes is not set, and a node sees only its own client's labels: set it"
        )
    else:
        measured = _none_of(_readable(clients_data, served))
    labelled = has_classes(form.loss, measured.target) and samples is not None and served is None
    return DataSet(
        train=_none_of(measured),
        test=measured,
        classes=int(form.classes or 0),
        loss=loss,
        metrics=tuple(map(named_loss, metrics or usual_metrics(loss, measured.target))),
        columns={"label": np.zeros(0, dtype=np.int64)} if labelled else {},
        sample_shape=form.shape if form.shape is not None else found_shape(measured),
        parts=clients_data,
        info={"source": "each client's own", **clients_data.facts}
        | ({"held_out": holdout.fraction} if holdout.fraction else {}),
        reading=dict(clients_data.reading),
        like=like,
    )


def _holdout(
    named: Mapping[str, str | None], fraction: float | None, seed: int, samples: str | None
) -> Holdout:
    """Decide how test samples are held out from each client.

    Raises:
        ConfigError: If two keys define the test samples, or the server does not have the samples to
            hold out.
    """
    found = holdout_of(fraction, seed, **named)
    if samples is None and fraction:
        raise ConfigError(
            f"data.test_fraction={fraction}, but in this run the samples stay at the clients. "
            "Leave it out; for an evaluation at the server set data.test_file or "
            "data.test_function."
        )
    return NO_HOLDOUT if found is None or samples is None else found


def _measured(
    brought: PerClientSource, file: str | None, function: str | None
) -> tuple[PerClientSource, Samples]:
    """Find the test samples, which also show the form of samples."""
    named, where = None, f"data.test_file={file}"
    if file is not None:
        named = read_npz(user_path("data.test_file", file), where)
    elif function is not None:
        key, where = "data.test_function", f"data.test_function={function}"
        call = partial(call_function, key, function, parameters=brought.parameters, at=PARAMETERS)
        named = gathered(call_twice(where, call), where)
    if named is not None:
        brought.reading.update(scale_of_bytes(named))
    if brought.spec.classes is None or brought.spec.shape is None:
        tables = [] if named is None else [brought.spec.validate(named, where)]
        if brought.source is not None:
            some = spread_clients(brought.num_clients, SIZES_SEEN).tolist()
            tables += [brought.whole(client) for client in some]
        brought = replace(brought, spec=_completed(brought.spec, tables))
    if named is not None:
        return brought, brought.spec.validate(named, where)
    if not brought.holdout.fraction:
        return brought, brought.spec.nothing()
    table = brought.held_out()
    if not len(table):
        raise ConfigError(
            f"data.test_fraction={brought.holdout.fraction} holds out no samples. Raise it, or "
            "set data.test_file or data.test_function."
        )
    return brought, table


def _completed(form: SampleSpec, tables: Sequence[Samples]) -> SampleSpec:
    """Derive from samples the parts of the form that are not configured."""
    if not tables:
        raise ConfigError(
            "data.classes or data.shape is not set, and the server has no samples to read them "
            "from. Give the number of outputs (1 for a number) and the shape of one input x ([] "
            "for token ids), such as data.classes=10 data.shape=[28,28], or set data.test_file."
        )
    first, classes = tables[0], form.classes
    if classes is None and read_as(form.loss).numbers:
        classes = first.target[0].numel()
    elif classes is None and not first.target.is_floating_point():
        seen = torch.cat([table.target.unique() for table in tables]).unique()
        seen = seen[seen != IGNORED_TOKEN]
        classes = max(2, 1 + int(seen.max()))
        if 2 * len(seen) < classes:
            raise DataError(
                f"data.samples: the labels are {seen.tolist()[:10]}, but most numbers from 0 to "
                f"{classes - 1} never occur. Number the classes from 0, or set data.classes."
            )
    if classes is None:
        raise ConfigError(
            f"data.classes is not set: give the number of outputs for the loss {form.loss}"
        )
    shape = found_shape(first) if form.shape is None else form.shape
    return replace(form, shape=shape, classes=classes)


def _readable(brought: PerClientSource, served: Sequence[int]) -> Samples:
    """Read the samples of the first of a node's clients that has some; raises as that read does."""
    for client in served[:-1]:
        with suppress(FedRacLoraError):  # its error is reported when the client is asked
            return brought.client(client)
    return brought.client(served[-1])


def _none_of(table: Samples) -> Samples:
    """Return a table of the same kind without rows."""
    return table.take(torch.zeros(0, dtype=torch.int64))
