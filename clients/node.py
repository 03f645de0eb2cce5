"""What a SuperNode keeps on its disk, and how it answers: base weights, and what stays with it.

Flower starts a fresh process for every message. The folder of a client is
``<cache>/<run>/<client>``, where ``cache`` is a key of the node's configuration.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, RecordDict

from clients.worker import Worker
from fedraclora.build import build_task, fix_bits, pick_device, plan_of, trainer_of
from fedraclora.checkpoint import load_tensors, save_tensors
from fedraclora.clientstore import ClientStore
from fedraclora.config import task_from_plain
from fedraclora.engines.deploy.grid import STALE
from fedraclora.errors import ConfigError, WireError
from fedraclora.parcel import Holding, read_holding
from fedraclora.privacy.secret import Secret
from fedraclora.settings import PretrainConfig
from fedraclora.training.cohort import CohortTrainer
from fedraclora.wire import clients_of
from fedraclora.wire.parcel import read_parcel

RUNS = 4  # of whose weights a cache keeps


def introduce(context: Context, run: str) -> RecordDict:
    """Say which clients this node serves, and which version of the base weights each holds."""
    held = [read_holding(folder_of(context, run, client)) for client in served(context)]
    versions = [-1 if found is None else found[1] for found in held]
    record = ConfigRecord({"ids": served(context), "held": versions})
    return RecordDict({"partition": record})


def answer(context: Context, run: str, content: RecordDict) -> RecordDict:
    """Train the client of a message, on weights that its parcel brings to the newest version."""
    (client,) = clients_of(content)
    if client not in served(context):
        raise WireError(f"this node serves the clients {served(context)}, not {client}")
    folder = folder_of(context, run, client)
    make_room(folder.parent)
    own = context.node_config.get("data")
    settings = str(context.run_config.get("cfg-json", ""))
    if own is None:  # then a client's trainer is every client's
        trainer = trainer_for(settings, None, 0, alone=False)
    else:
        trainer = trainer_for(settings, str(own), client, alone=len(served(context)) == 1)
    holding = Holding(folder, trainer.plan, trainer.device)
    holding.begin(dict(trainer.task.model.named_parameters()))
    if not holding.follow(read_parcel(content)):
        return RecordDict({STALE: ConfigRecord({"held": holding.version})})
    if trainer.local.dp is not None:
        trainer.noise_seed = Secret.of_folder(folder, resume=False).number("sample noise")
    store = read_store(folder, generations(settings))
    reply = Worker(trainer, holding, store).train(content)
    if kept := store.since(0):
        save_tensors(store_file(folder), kept, {}, sync=True)
        store_file(folder).chmod(0o600)  # keys of secure aggregation may be among it
    reply["job"] = ConfigRecord({"held": holding.version, "mark": str(holding.mark)})
    return reply


def served(context: Context) -> list[int]:
    """Read the ids of the clients of this node.

    Raises:
        ConfigError: If the node's configuration does not name them.
    """
    config = context.node_config
    text = str(config.get("partition-ids", config.get("partition-id", "")))
    ids = [int(word) for word in text.replace(",", " ").split() if word.isdecimal()]
    if not ids:
        raise ConfigError(
            f"node-config has partition-id={text!r}: the number of this node's client is wanted, "
            "or partition-ids with several, parted by commas"
        )
    return ids


def folder_of(context: Context, run: str, client: int) -> Path:
    """Give the folder in which a client keeps what it holds of a run."""
    home = os.environ.get("FLWR_HOME", "~/.flwr")
    cache = str(context.node_config.get("cache", Path(home) / "fedraclora"))
    if not run.isalnum():  # it becomes a path, and comes from outside
        raise WireError(f"a run is called {run!r}; letters and digits are wanted")
    return Path(cache).expanduser() / run / str(client)


def make_room(folder: Path) -> None:
    """Make the folder of a run, and remove those of the oldest where there are too many."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()
    runs = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in runs[:-RUNS]:
        shutil.rmtree(old, ignore_errors=True)


def store_file(folder: Path) -> Path:
    """Where a client keeps what stays with it."""
    return folder / "kept.safetensors"


def generations(settings: str) -> int:
    """How many rounds to keep: a server that is restored goes back to its last checkpoint."""
    return int(json.loads(settings)["output"]["checkpoint_every"]) + 1


def read_store(folder: Path, rounds: int) -> ClientStore:
    """Read what stays at a client; nothing where it has trained nothing so far.

    Args:
        folder: Of the client.
        rounds: How many of them to keep.

    Raises:
        CheckpointError: If the file is damaged: what is in it is nowhere else.
    """
    store, path = ClientStore(rounds), store_file(folder)
    if path.is_file():
        tensors, _ = load_tensors(path, f"restore it, or remove it and begin anew: {path}")
        store.restore(tensors)
    return store


@lru_cache(maxsize=1)
def trainer_for(settings: str, own: str | None, client: int, *, alone: bool) -> CohortTrainer:
    """Build data and model of a run.

    Args:
        settings: The config of the run, as JSON.
        own: What the node's configuration says of its data, or None.
        client: Whose they are.
        alone: Whether the node has no other client.

    Raises:
        ConfigError: If the run wants data of the clients' own and the node has none, or it has
            some and the run wants others.
    """
    plain = json.loads(settings)
    if (plain["data"]["name"] == "own") != (own is not None):
        raise ConfigError(
            f"node-config has data={own!r}, and the run has data={plain['data']['name']}: a run "
            "with data=own needs data in node-config (a folder, or package.module:function), and "
            "no other run has a use for it"
        )
    if own is not None:
        plain["data"] |= {"samples": own, "client": client, "alone": alone}
    config = task_from_plain(plain)
    fix_bits(config.engine.threads, pick_device(config.device))
    # Pretrained weights come from the server.
    built = build_task(replace(config, pretrain=PretrainConfig()))
    return trainer_of(config, built, plan_of(config, built.task))
