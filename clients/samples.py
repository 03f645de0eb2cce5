"""Check that a client's samples do not change during a run.

A checksum of all samples of a client is stored beside its state on the node's disk. It is compared
in each new process of the node, and never sent: from the checksum of a few samples one could guess
them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from fedraclora.clients.cache import on_disk
from fedraclora.data.task import Task
from fedraclora.errors import DataError
from fedraclora.object_registry import object_digest
from fedraclora.run.digests import read_sealed, sealed
from fedraclora.tree import digest
from fedraclora.weights.files import write_text

FILE = "samples.json"
KEY = "samples"


def check_samples(folder: Path, client: int, task: Task) -> None:
    """Compare the samples of a client with their checksum, which its first round stores.

    Args:
        folder: The client's folder of the run.
        client: The client.
        task: The task with its samples.

    Raises:
        CheckpointError: If the stored checksum is damaged.
        ClientError: If the checksum cannot be written.
        DataError: If the samples have changed.
    """
    path, found = folder / FILE, samples_digest(client, task)
    if path.is_file():
        if read_sealed(path).get(KEY) != found:
            raise DataError(
                f"client {client}: its samples differ from those with which it began this run "
                f"(checksum in {FILE} in the node's cache). Restore the samples, or begin a "
                "new run"
            )
        return
    with on_disk(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, sealed({KEY: found}))
        path.chmod(0o600)


def samples_digest(client: int, task: Task) -> str:
    """Hash all training and test samples of a client."""
    found = hashlib.sha256()
    for data in (task.train, None if task.held is None else task.held.data):
        if data is None:
            continue
        ids = torch.tensor([client], device=task.test.target.device)
        samples = data.samples_of(ids)
        found.update(digest(samples.tensors).encode())
        if data.opaque and task.brought is not None:
            own = task.brought(client)
            found.update(str(getattr(own, "_fingerprint", None) or object_digest(own)).encode())
    return found.hexdigest()
