"""Samples that each client brings itself: files of its own, or a function of its own.

The server knows what a sample looks like, and has samples to measure on. In a deployment every
other sample stays where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fedraclora.data.checks import check_count
from fedraclora.data.dataset import DataSet
from fedraclora.errors import ConfigError, DataError
from fedraclora.named import import_function
from fedraclora.samples import Samples

TARGET = "target"


@dataclass(frozen=True)
class Brought:
    """Client data that are looked for when a client is asked.

    Attributes:
        source: A folder, or ``package.module:function``; None: they are on other machines.
        num_clients: Size of the population.
        shape: Of one input ``"x"``; empty for token ids.
        only: The one client that is here; None: all are, if any.
        device, dtype: Where to, and what floating samples become; None: as they come.
    """

    source: str | None
    num_clients: int
    shape: tuple[int, ...]
    only: int | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    _found: dict[int, Samples] = field(default_factory=dict, repr=False, compare=False)

    def client(self, client: int) -> Samples:
        """Give the samples of one client.

        Raises:
            ConfigError: If they are on another machine.
            DataError: If they are missing, or not what they should be.
        """
        if self.source is None:
            raise ConfigError(
                "data=own: the samples are with their owners; run it with engine=deploy, or set "
                "data.samples to a folder or a function that has those of every client"
            )
        if client not in self._found:
            self._found[client] = read_own(self.source, client, self.shape).to(
                self.device, self.dtype
            )
        return self._found[client]

    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        """Number of samples of each client: int64 [K]; 1 for those that are elsewhere."""
        here = [self.source is not None and self.only in {None, c} for c in clients.tolist()]
        sizes = [
            len(self.client(c)) if found else 1
            for c, found in zip(clients.tolist(), here, strict=True)
        ]
        return torch.tensor(sizes, dtype=torch.int64, device=clients.device)

    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        """Take samples by position in the client: ids [K], positions [K, b] -> K * b rows."""
        taken = []
        for client, rows in zip(clients.tolist(), positions, strict=True):
            own = self.client(client)
            # A padded position may point past the last sample; the caller masks it.
            taken.append(own.take(rows.flatten().clamp(max=len(own) - 1)))
        inputs = {n: torch.cat([t.inputs[n] for t in taken]) for n in taken[0].inputs}
        return Samples(inputs, torch.cat([t.target for t in taken]))

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
        return Brought(self.source, self.num_clients, self.shape, self.only, device, dtype)


def own_samples(
    *,
    clients: int,
    classes: int,
    shape: Sequence[int] = (),
    samples: str | None = None,
    test: str | None = None,
    client: int | None = None,
    loss: str = "cross_entropy",
    metrics: Sequence[str] = ("accuracy", "loss"),
) -> DataSet:
    """Describe samples that clients bring. Use it with ``partition=given``.

    Args:
        clients: Number of clients.
        classes: Number of outputs: classes, or 1 for a scalar.
        shape: Shape of one input ``"x"``; empty for token ids.
        samples: Those of the clients: a folder or ``package.module:function``. A node sets it from
            its own configuration; in a simulation it has the samples of every client.
        test: Those that the server measures on: a ``.npz`` file or ``package.module:function``.
        client: Set by a node: its client. Nothing is measured there.
        loss: A key of `fedraclora.task.LOSSES`, or ``package.module:function``.
        metrics: Names of metrics, the headline first.

    Returns:
        Floating numbers in float32. The clients are `parts` that are looked for on demand; the
        table beside them is that of the server, at a node that of its client.

    Raises:
        ConfigError: If a key is wrong or missing.
        DataError: If samples are missing, or not what they should be.
    """
    check_count("data.classes", classes)
    brought = Brought(samples, clients, tuple(shape), client)
    if client is not None:
        table = brought.client(client)
    elif test is None:
        raise ConfigError(
            "data.test is not set: the server measures on samples of its own; give a .npz file or "
            "package.module:function"
        )
    else:
        table = read_table(test, tuple(shape))
    return DataSet(
        train=table,
        test=table,
        classes=classes,
        loss=loss,
        metrics=tuple(metrics),
        columns={},
        sample_shape=tuple(shape),
        parts=brought,
        info={"source": "each client's own"},
    )


def read_own(source: str, client: int, shape: tuple[int, ...]) -> Samples:
    """Read the samples of one client.

    Args:
        source: ``package.module:function``, which is called with the client's id; or a folder with
            ``<id>.npz``, or ``train.npz`` where it has one client's alone.
        client: The id.
        shape: Of one input ``"x"``.
    """
    if ":" in source:
        return checked(import_function("data", source)(client), source, shape)
    folder = Path(source).expanduser()
    named = [folder / f"{client}.npz", folder / "train.npz"]
    for path in named:
        if path.is_file():
            return checked(_read_npz(path), str(path), shape)
    raise DataError(f"client {client} has no samples: neither {named[0]} nor {named[1]} is there")


def read_table(source: str, shape: tuple[int, ...]) -> Samples:
    """Read samples from a ``.npz`` file, or from a function without arguments."""
    if ":" in source:
        return checked(import_function("data.test", source)(), source, shape)
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"data.test: there is no file {path}")
    return checked(_read_npz(path), source, shape)


def _read_npz(path: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:  # pickles could run code
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if TARGET not in arrays or len(arrays) < 2:
        raise DataError(
            f"{path} holds {[*arrays]}; {TARGET} is wanted, and x (or the inputs of the model by "
            "name)"
        )
    target = arrays.pop(TARGET)
    return arrays, target


def checked(found: object, source: str, shape: tuple[int, ...]) -> Samples:
    """Make samples of what was found, and hold them against what they should be.

    Args:
        found: `Samples`, or (inputs, target) where inputs are one array or a dict of arrays.
        source: For messages.
        shape: Of one input ``"x"``; empty for token ids.

    Raises:
        DataError: Saying what came and what was wanted.
    """
    if isinstance(found, Samples):
        samples = found
    elif isinstance(found, tuple) and len(found) == 2:
        inputs = found[0] if isinstance(found[0], dict) else {"x": found[0]}
        samples = Samples(
            {n: torch.as_tensor(a) for n, a in inputs.items()}, torch.as_tensor(found[1])
        )
    else:
        raise DataError(f"{source} gives a {type(found).__name__}; (inputs, target) is wanted")
    sizes = {name: len(tensor) for name, tensor in samples.inputs.items()}
    if not len(samples) or {*sizes.values()} != {len(samples)}:
        raise DataError(
            f"{source}: {len(samples)} targets and inputs of {sizes} samples; one or more are "
            "wanted, of each as many"
        )
    x = samples.inputs.get("x")
    if shape and (x is None or tuple(x.shape[1:]) != shape):
        came = [*sizes] if x is None else tuple(x.shape[1:])
        raise DataError(f"{source}: one input is {came}; x of shape {shape} is wanted (data.shape)")
    # Copied into memory of torch's own: matrix products round by alignment.
    return samples.clone().to("cpu", torch.float32)
