"""What a SuperNode keeps on its disk, and how it answers: base weights, and what stays with it.

What must last is on the disk (`clients.cache`): the process that answers may be killed at any time,
and the next message then meets a fresh one. What it keeps in memory saves reading that again.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, RecordDict

from fedraclora.binding import Plain
from fedraclora.clients.answers import Answers
from fedraclora.clients.cache import folder_of, is_claimed, make_room, on_disk, served
from fedraclora.clients.worker import Worker
from fedraclora.config.build import build_task, fix_bits, pick_device, plan_of, terms_of, trainer_of
from fedraclora.config.run_config import task_from_plain
from fedraclora.config.settings import PretrainConfig
from fedraclora.engines.records import from_records, to_records
from fedraclora.engines.replies import STALE
from fedraclora.errors import ConfigError, WireError
from fedraclora.privacy.secagg import SecAggTerms
from fedraclora.privacy.secret import KEY_BYTES
from fedraclora.run.client_state import ClientStore
from fedraclora.training.cohort import CohortTrainer
from fedraclora.weights.files import load_tensors, save_tensors
from fedraclora.weights.replica import StoredReplica, read_stored_replica
from fedraclora.wire.downlink import AskReader
from fedraclora.wire.records import clients_of
from fedraclora.wire.reply import write_answer
from fedraclora.wire.weight_update import read_weight_update

KEPT = 4  # clients whose weights, and data of their own, stay in memory


def introduce(context: Context, run: str) -> RecordDict:
    """Report which clients this node serves, and which version of the base weights each holds."""
    folders = [folder_of(context, run, client) for client in served(context)]
    replicas = [
        read_stored_replica(folder) if is_claimed(folder.parent) else None for folder in folders
    ]
    versions = [-1 if found is None else found[1] for found in replicas]
    record = ConfigRecord({"ids": served(context), "held": versions})
    return RecordDict({"partition": record})


def answer(context: Context, run: str, content: RecordDict) -> RecordDict:
    """Train the client of a message, on weights that its update brings to the newest version.

    Raises:
        ClientError: If its folder cannot be written to.
        WireError: If the message is for a client that is not served here.
    """
    asked = from_records(content)
    (client,) = clients_of(asked)
    if client not in served(context):
        raise WireError(
            f"a message is for client {client}, but this node serves the clients {served(context)}"
        )
    folder = folder_of(context, run, client)
    make_room(folder.parent)
    own = context.node_config.get("data")
    settings = str(context.run_config.get("cfg-json", ""))
    if own is None:  # then a client's trainer is every client's
        found = trainer_for(settings, None, 0, alone=False)
    else:
        found = trainer_for(settings, str(own), client, alone=len(served(context)) == 1)
    trainer, terms = found
    holding = replica_of(folder, trainer)
    with on_disk(folder):
        followed = holding.follow(read_weight_update(asked))
    if not followed:
        return RecordDict({STALE: ConfigRecord({"held": holding.version})})

    def compute() -> RecordDict:
        # New for every answer that is computed: nothing that anybody could ask for draws it again.
        trainer.answer_key = os.urandom(KEY_BYTES)
        store = read_store(folder, generations(settings))
        answer = Worker(trainer, holding, store, terms).train(AskReader().read(asked))
        if stored := store.since(0):
            with on_disk(folder):
                save_tensors(store_file(folder), stored, {}, sync=True)
                store_file(folder).chmod(0o600)  # keys of secure aggregation may be among it
        return to_records(write_answer(answer))

    if not trainer.local.answers_once and terms is None:
        reply = compute()
    else:
        answers = Answers(folder, int(json.loads(settings)["rounds"]))
        reply = answers.once(content, f"{holding.version} {holding.mark}", compute)
    reply["job"] = ConfigRecord({"held": holding.version, "mark": str(holding.mark)})
    return reply


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


@lru_cache(maxsize=KEPT)
def replica_of(folder: Path, trainer: CohortTrainer) -> StoredReplica:
    """Read the base weights of a client, or begin with those of the model."""
    holding = StoredReplica(folder, trainer.plan, trainer.device)
    holding.begin(dict(trainer.task.model.named_parameters()))
    return holding


@lru_cache(maxsize=KEPT)
def trainer_for(
    settings: str, own: str | None, client: int, *, alone: bool
) -> tuple[CohortTrainer, SecAggTerms | None]:
    """Build data and model of a run, and what its clients insist on in secure aggregation.

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
        data = plain["data"]
        if data.get("samples") is None and data.get("test") is None:
            data["test_share"] = 0.0  # the server has no sample: a client's are all its own
        data |= {"samples": own, "client": client, "alone": alone}
    return built_from(plain)


def built_from(plain: Plain) -> tuple[CohortTrainer, SecAggTerms | None]:
    """Build data and model of a config, and what clients insist on in secure aggregation."""
    config = task_from_plain(plain)
    fix_bits(config.engine.threads, pick_device(config.device))
    # Pretrained weights come from the server: to train them here again would be for nothing.
    built = build_task(replace(config, pretrain=PretrainConfig()))
    trainer = trainer_of(config, built, plan_of(config, built.task))
    return trainer, terms_of(config, built)
