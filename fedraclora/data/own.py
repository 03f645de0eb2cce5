"""Samples that each client brings itself: files of its own, or a function of its own.

The server knows what a sample looks like, and may have samples to measure on. In a deployment every
other sample stays where it is. Nothing is trained on at the server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from fedraclora.binding import call_function
from fedraclora.data.arrays import read_npz
from fedraclora.data.dataset import (
    OF_RUN,
    TEST_SHARE,
    Clients,
    DataSet,
    RowNumbers,
    refuse_both,
    split_rows,
    take,
)
from fedraclora.data.entries import Entries, length, parts_of, stand_in
from fedraclora.data.fit import (
    Form,
    found_shape,
    gathered,
    said_of_inputs,
    scale_of_bytes,
)
from fedraclora.data.locate import user_path
from fedraclora.data.objective import said_like, usual_metrics
from fedraclora.data.own_loss import IGNORED_TOKEN, named_loss
from fedraclora.data.partition import SIZES_SEEN, spread_clients
from fedraclora.data.samples import Samples
from fedraclora.data.task import read_as
from fedraclora.errors import ConfigError, DataError
from fedraclora.imports import is_function
from fedraclora.limits import Count, Fraction, Later, Part, limited
from fedraclora.rng import generator

ONLY_FILE = "train.npz"  # the file of a folder that is one client's
ARGUMENTS = "data.arguments"
OF_A_NODE = Part("node")  # keys that a node sets, and no choice lists


def counted(samples: str | None, clients: int | None) -> int:
    """Return the number of clients, which the files of a folder may determine.

    Raises:
        ConfigError: If nothing tells it.
        DataError: If the numbers of the files leave one out.
    """
    if clients is not None:
        return clients
    if samples is None or is_function(samples):
        raise ConfigError(
            "clients is not set: say for how many clients there are samples, for example clients=3"
        )
    numbers = _numbers(folder := _folder(samples))
    if not numbers:
        if (folder / ONLY_FILE).is_file():
            return 1
        raise DataError(
            f"data.samples={samples}: there is no file 0.npz, 1.npz, ... in this folder"
        )
    missing = sorted({*range(max(numbers) + 1)} - numbers)
    if missing:
        raise DataError(
            f"data.samples={samples}: there is {max(numbers)}.npz but no {missing[0]}.npz; clients "
            "are numbered from 0 without a gap"
        )
    return len(numbers)


def _folder(samples: str) -> Path:
    folder = user_path("data.samples", samples)
    if folder.is_file():
        raise DataError(
            f"data.samples={samples} is a file; a folder with 0.npz, 1.npz, ... or module:function "
            "is wanted. A file that is to be divided among clients is for data=table (CSV, "
            "Parquet) or data=arrays (.npz)"
        )
    return folder


def _numbers(folder: Path) -> set[int]:
    return {int(file.stem) for file in folder.glob("*.npz") if file.stem.isdecimal()}


def read_own(
    source: str, client: int, *, alone: bool = False, arguments: Mapping[str, object] | None = None
) -> tuple[Samples, Samples | None]:
    """Read the samples of one client.

    Args:
        source: ``package.module:function``, which is called with the client's id; or a folder with
            ``<id>.npz``, or ``train.npz`` where it has one client's alone.
        client: The id.
        alone: Whether no other client can mean the same folder.
        arguments: Further ones of the function, by name.

    Returns:
        What it may train on; and its own test samples, where it has some: beside ``<id>.npz``
        those of ``<id>.test.npz``, beside ``train.npz`` those of ``test.npz``, and of a function
        what stands under ``test`` beside ``train``.

    Raises:
        DataError: If they are missing.
    """
    where = f"client {client} (data.samples={source})"
    if is_function(source):
        found = call_function("data.samples", source, client, parameters=arguments, at=ARGUMENTS)
        train, test = parts_of(found)
        return gathered(train, where), None if test is None else gathered(test, f"{where}, test")
    folder = _folder(source)
    named, only = folder / f"{client}.npz", folder / ONLY_FILE
    if named.is_file():
        return _with_test(named, folder / f"{client}.test.npz", where)
    if not only.is_file():
        raise DataError(f"{where} has no samples: neither {named} nor {only} is there")
    if not alone or _numbers(folder):
        raise DataError(
            f"{where} has no samples: {named} is not there, and {only} is one client's alone; with "
            "several clients each has its own file, 0.npz, 1.npz, ..."
        )
    return _with_test(only, folder / "test.npz", where)


def _with_test(file: Path, test: Path, where: str) -> tuple[Samples, Samples | None]:
    found = read_npz(file, where)
    return found, read_npz(test, f"{where}, test") if test.is_file() else None


@dataclass(frozen=True)
class Brought:
    """Client data that are looked for when a client is asked.

    Attributes:
        source: A folder, or ``package.module:function``; None: they are on other machines.
        num_clients: Size of the population.
        form: What samples look like.
        only: The one client that is here; None: all are, if any.
        alone: Whether the client that is here is its node's only one.
        share: Fraction of each client's samples that is held out, to measure on.
        split_seed: Of that choice.
        arguments: Further ones of the function, by name.
        device, dtype: Where to, and what floating samples become; None: as they come.
        objects: Whether the function gives what only a training function of the user's reads.
        reading: What was done to the numbers of those that were looked at (`DataSet.reading`).
        told: The same, in words.
    """

    source: str | None
    num_clients: int
    form: Form
    only: int | None = None
    alone: bool = False
    share: float = 0.0
    split_seed: int = 0
    arguments: Mapping[str, object] = field(default_factory=dict)
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    objects: bool = False
    reading: dict[str, object] = field(default_factory=dict, repr=False, compare=False)
    told: dict[str, object] = field(default_factory=dict, repr=False, compare=False)
    _found: dict[int, Samples] = field(default_factory=dict, repr=False, compare=False)
    _held_out: dict[int, Samples] = field(default_factory=dict, repr=False, compare=False)
    _read: dict[int, Samples] = field(default_factory=dict, repr=False, compare=False)
    _tests: dict[int, Samples | None] = field(default_factory=dict, repr=False, compare=False)
    _own: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def client(self, client: int) -> Samples:
        """Return the training samples of one client.

        Raises:
            ConfigError: If they are on another machine.
            DataError: If they are missing, or not what they should be.
        """
        if client not in self._found:
            whole = self.whole(client)
            self._read.pop(client, None)
            training, held_out = self._training(len(whole), client)
            found = take(whole, training) if len(held_out) else whole
            self._found[client] = found.to(self.device, self.dtype)
            if self.share and self.only is None:
                self._held_out[client] = take(whole, held_out)
        return self._found[client]

    def own(self, client: int) -> Any:
        """Return the training samples of one client as its function gives them.

        Raises:
            DataError: If it fails.
        """
        if client not in self._own:
            found = call_function(
                "data.samples", str(self.source), client, parameters=self.arguments, at=ARGUMENTS
            )
            found, _ = (found, None) if self.objects else parts_of(found)
            size = length(found) if self.objects else len(self.whole(client))
            rows = self._training(size, client)[0]
            each = Entries.of([found], [size]).keep(rows)
            self._own[client] = each.client_of([np.arange(len(rows))], 0)
        return self._own[client]

    def tests(self, client: int) -> Samples | None:
        """Return the test samples that a client brings; None where it has none, or is elsewhere."""
        if self.source is None or self.only not in {None, client}:
            return None
        if client not in self._tests and not self.objects:
            self.whole(client)
        found = self._tests.get(client)
        return None if found is None else found.to(self.device, self.dtype)

    def _training(self, size: int, client: int) -> tuple[RowNumbers, RowNumbers]:
        """Choose the rows that a client trains on, and those that are held out."""
        rng = generator(self.split_seed, "split", "test", client)
        training, held_out = split_rows(size, self.share, rng)
        # A client has something to train on.
        return (training, held_out) if len(training) else (held_out, training)

    def held_out(self) -> Samples:
        """Return the samples of all clients that they do not train on."""
        for client in range(self.num_clients):
            self.client(client)
        return Samples.join([self._held_out.pop(client) for client in range(self.num_clients)])

    @property
    def found(self) -> list[Samples]:
        """The samples of the clients that were asked so far."""
        return [*self._found.values()]

    def whole(self, client: int) -> Samples:
        """Return all samples of one client; its source is asked for them once."""
        if self.source is None:
            raise ConfigError(
                "data=own: the samples are with their owners; run it with engine=deploy, or set "
                "data.samples to a folder or a function that has those of every client"
            )
        if self.objects:
            return stand_in(length(self.own(client)))
        if client not in self._read:
            alone, said = self.alone or self.num_clients == 1, self.arguments
            found, test = read_own(self.source, client, alone=alone, arguments=said)
            self._read[client] = found
            where = f"client {client}, test (data.samples={self.source})"
            self._tests[client] = None if test is None else self.form.fit(test, where)
        self.reading.update(scale_of_bytes(self._read[client]))
        where = f"client {client} (data.samples={self.source})"
        fitted = self.form.fit(self._read[client], where)
        self.told.update(said_of_inputs(self._read[client], fitted))
        return fitted

    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        """Number of samples of each client: int64 [K]; 1 for those that are elsewhere."""
        known = self.source is not None
        sizes = [
            len(self.client(c)) if known and self.only in {None, c} else 1 for c in clients.tolist()
        ]
        return torch.tensor(sizes, dtype=torch.int64, device=clients.device)

    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        """Take samples by position in the client: ids [K], positions [K, b] -> K * b rows."""
        taken = []
        for client, rows in zip(clients.tolist(), positions, strict=True):
            own = self.client(client)
            # A padded position may point past the last sample; the caller masks it.
            taken.append(own.take(rows.flatten().clamp(max=len(own) - 1)))
        return Samples.join(taken)

    def lengths(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """Tokens without padding, int64 like ``positions``; None where samples have no mask."""
        found = []
        for client, rows in zip(clients.tolist(), positions, strict=True):
            own = self.client(client)
            if own.lengths is None:
                return None
            found.append(own.lengths[rows.clamp(max=len(own) - 1)])
        return torch.stack(found)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Brought:
        """Move to a device; floating samples take ``dtype`` when given."""
        found = {client: samples.to(device, dtype) for client, samples in self._found.items()}
        return replace(self, device=device, dtype=dtype, _found=found)


@limited("data")
def own_samples(
    *,
    clients: Annotated[Clients | None, OF_RUN],
    classes: Count | None = None,
    shape: Sequence[int] | None = None,
    samples: str | None = None,
    arguments: Mapping[str, object] | None = None,
    test: str | None = None,
    test_share: Fraction | None = None,
    split_seed: int = 0,
    client: Annotated[int | None, OF_A_NODE] = None,
    alone: Annotated[bool, OF_A_NODE] = False,
    objects: Annotated[bool, Later()] = False,
    loss: str | Mapping[str, object] = "cross_entropy",
    metrics: Sequence[str | Mapping[str, object]] | None = None,
) -> DataSet:
    """Describe samples that clients bring; they are the division, too.

    Args:
        clients: Number of clients; None: as many as the folder ``samples`` has files.
        classes: Number of outputs: classes, or 1 for a scalar; None: as the samples have.
        shape: Shape of one input ``"x"``; empty for token ids; None: as the samples have.
        samples: Those of the clients: a folder or ``package.module:function``. A node sets it from
            its own configuration; in a simulation it has the samples of every client.
        arguments: Of the functions that ``samples`` and ``test`` name, by name.
        test: Those that the server measures on: a ``.npz`` file or ``package.module:function``.
        test_share: Without them, the fraction of each client's samples that is held out for it; 0:
            the server has no sample; None: 0.2, and 0 where it has no samples of clients.
        split_seed: Seed of that choice.
        client: Set by a node: its client. Nothing is measured there.
        alone: Set by a node: it serves this client only.
        objects: Whether the function ``samples`` gives what only ``local.train`` reads (texts,
            images, paths): nothing is measured then.
        loss: A key of `fedraclora.data.task.LOSSES`, or ``package.module:function``; a mapping of
            that as its ``name``, and parameters.
        metrics: Metrics, the headline first, in the same way; None for those usual for the loss.

    Returns:
        Floating numbers in float32. The clients are `parts` that are looked for on demand; no
        training table is beside them, and at a node no test table either.

    Raises:
        ConfigError: If a key is wrong or missing.
        DataError: If samples are missing, or not what they should be.
    """
    loss = named_loss(loss)
    like = said_like(loss)
    form = Form(None if shape is None else tuple(shape), like or loss, classes)
    share, said = _share(test, test_share, samples), arguments or {}
    functions = [name for name in (samples, test) if name is not None and is_function(name)]
    if said and samples is not None and not functions:
        raise ConfigError(
            f"data.arguments is {dict(said)}, and no function is named that would get them: name "
            "one as data.samples or data.test, or leave them out"
        )
    count = counted(samples, clients)
    if objects:
        if test is not None or test_share:
            raise ConfigError("data.objects is true, of which nobody measures: leave data.test out")
        if samples is not None and not is_function(samples):
            raise ConfigError(f"data.samples is {samples}; with data.objects a function is wanted")
        brought = Brought(samples, count, form, client, alone, arguments=said, objects=True)
        info: dict[str, object] = {"source": "each client's own", "loss_from": "nobody measures"}
        nothing = stand_in(0)
        return DataSet(nothing, nothing, 1, loss, (), {}, (), brought, info=info)
    brought = Brought(samples, count, form, client, alone, share, split_seed, said)
    if client is None:
        brought, measured = _measured(brought, test)
        form = brought.form
    elif classes is None:
        raise ConfigError("data.classes is not set, and a node cannot know it")
    else:
        measured = _none_of(brought.client(client))
    labelled = form.loss == "cross_entropy" and samples is not None and client is None
    return DataSet(
        train=_none_of(measured),
        test=measured,
        classes=int(form.classes or 0),
        loss=loss,
        metrics=tuple(map(named_loss, metrics or usual_metrics(loss, measured.target))),
        columns={"label": np.zeros(0, dtype=np.int64)} if labelled else {},
        sample_shape=form.shape if form.shape is not None else found_shape(measured),
        parts=brought,
        info={"source": "each client's own", **brought.told}
        | ({"held_out": share} if share else {}),
        reading=dict(brought.reading),
        like=like,
    )


def _share(test: str | None, share: float | None, samples: str | None) -> float:
    """Fraction of each client's samples that is held out.

    Raises:
        ConfigError: If there are two answers to the question what is measured on, or a share of
            samples that the server does not have.
    """
    refuse_both(test, share)
    if samples is None and share:
        raise ConfigError(
            f"data.test_share={share} holds samples of clients out for the server, and those of "
            "this run are with their owners: leave it out; what the server is to measure on, if "
            "anything, is data.test, a .npz file or package.module:function"
        )
    if test is not None or samples is None:
        return 0.0
    return TEST_SHARE if share is None else share


def _measured(brought: Brought, test: str | None) -> tuple[Brought, Samples]:
    """Find what is measured on, and with it what samples look like."""
    named, where = None, f"data.test={test}"
    if test is not None and is_function(test):
        found = call_function("data.test", test, parameters=brought.arguments, at=ARGUMENTS)
        named = gathered(found, where)
    elif test is not None:
        named = read_npz(user_path("data.test", test), where)
    if named is not None:
        brought.reading.update(scale_of_bytes(named))
    if brought.form.classes is None or brought.form.shape is None:
        tables = [] if named is None else [brought.form.fit(named, where)]
        if brought.source is not None:
            some = spread_clients(brought.num_clients, SIZES_SEEN).tolist()
            tables += [brought.whole(client) for client in some]
        brought = replace(brought, form=_completed(brought.form, tables))
    if named is not None:
        return brought, brought.form.fit(named, where)
    if not brought.share:
        return brought, brought.form.nothing()
    table = brought.held_out()
    if not len(table):
        raise ConfigError(
            f"data.test_share={brought.share} holds no sample out: raise it, or name test samples "
            "with data.test"
        )
    return brought, table


def _completed(form: Form, tables: Sequence[Samples]) -> Form:
    """Read from samples what is not said of them."""
    if not tables:
        raise ConfigError(
            "data.classes or data.shape is not set, and the server has no sample that would tell: "
            "say how many outputs there are (1 for a number) and the shape of one input x ([] for "
            "token ids), for example data.classes=10 data.shape=[28,28]; or give it data.test"
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
                f"data.samples: the labels are {seen.tolist()[:10]}, and most between 0 and "
                f"{classes - 1} never occur: number the classes from 0, or say how many there are "
                "with data.classes"
            )
    if classes is None:
        raise ConfigError(
            f"data.classes is not set: say how many outputs the loss {form.loss} wants"
        )
    shape = found_shape(first) if form.shape is None else form.shape
    return replace(form, shape=shape, classes=classes)


def _none_of(table: Samples) -> Samples:
    """Return a table of the same kind without a row."""
    return table.take(torch.zeros(0, dtype=torch.int64))
