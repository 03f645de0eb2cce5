"""Answer messages on a SuperNode, with base weights and client state on its disk.

Lasting state is on the disk (`clients.cache`): the process may be killed at any time, and the next
message then reaches a new one. Copies in memory save reading it again.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, RecordDict

from fedraclora.binding import Plain, section
from fedraclora.clients.answers import ReplyCache
from fedraclora.clients.cache import folder_of, is_claimed, make_room, on_disk, some
from fedraclora.clients.samples import check_samples
from fedraclora.clients.worker import Worker
from fedraclora.config.builder import TaskBuilder
from fedraclora.config.run_config import task_from_plain
from fedraclora.engines.asks import read_ask
from fedraclora.engines.node_config import served
from fedraclora.engines.records import clients_of, read_weight_update, write_answer
from fedraclora.engines.replies import FORMAT, STALE
from fedraclora.errors import ConfigError, WireError
from fedraclora.object_registry import is_named, named_object
from fedraclora.privacy.secagg import SecAggTerms
from fedraclora.privacy.secret import KEY_BYTES
from fedraclora.run.client_state import ClientStore
from fedraclora.training.cohort import CohortTrainer
from fedraclora.tree import Tree
from fedraclora.weights.files import load_tensors, save_tensors
from fedraclora.weights.replica import StoredReplica, read_stored_replica
from fedraclora.wire.answers import Answer, NoAnswer
from fedraclora.wire.exchange import Ask
from fedraclora.wire.together import chunks_of, join_answers, part_of, split_answer, unanswered

KEPT = 4  # runs and nodes whose weights and data stay in memory


def introduce(context: Context, run: str) -> RecordDict:
    """Report which clients this node serves, and which version of the base weights it holds."""
    folder = folder_of(context, run, served(context.node_config)[0])
    found = read_stored_replica(folder) if is_claimed(folder.parent) else None
    version = -1 if found is None else found[1]
    record = ConfigRecord({"ids": served(context.node_config), "held": version, "format": FORMAT})
    if (name := context.node_config.get("name")) is not None:
        record["name"] = str(name)
    return RecordDict({"partition": record})


def answer(context: Context, run: str, content: RecordDict) -> RecordDict:
    """Answer a message: update the base weights, then train its clients.

    A client that fails is named in the reply; if it is the only one, its error is raised.

    Raises:
        ClientError: If a folder is not writable.
        WireError: If the message is for a client that this node does not serve.
    """
    mine = served(context.node_config)
    if strangers := sorted({*clients_of(content)} - {*mine}):
        raise WireError(
            f"the server sent a message for the clients {some(strangers)}, but this node "
            f"serves {some(mine)}. Check partition-ids in node-config"
        )
    folder = folder_of(context, run, mine[0])  # weights are shared by all clients of the node
    make_room(folder.parent)
    own = context.node_config.get("data")
    settings = str(context.run_config.get("cfg-json", ""))
    owners = () if own is None else (*mine,)  # otherwise the data of all clients are here
    trainer, terms = trainer_for(settings, None if own is None else str(own), owners)
    worker, holding = worker_of(folder, trainer, terms)
    with on_disk(folder):
        followed = holding.follow(read_weight_update(content))
    if not followed:
        return RecordDict({STALE: ConfigRecord({"held": holding.version})})
    version = f"{holding.version} {holding.mark}"
    handler = NodeHandler(worker, version, folder.parent, json.loads(settings))
    reply = write_answer(handler.answer(read_ask(content)))
    held: dict[str, Any] = {"held": holding.version, "mark": str(holding.mark)}
    reply["job"] = ConfigRecord({**held, "run": run})
    return reply


@dataclass(frozen=True)
class NodeHandler:
    """Answer one message for the clients of this node.

    Attributes:
        worker: Trains them.
        version: Version of the base weights, and their fingerprint.
        folder: The run's folder, with one for each client.
        settings: The config of the run.
    """

    worker: Worker
    version: str
    folder: Path
    settings: dict[str, Any]

    def answer(self, ask: Ask) -> Answer:
        """Answer a request, chunk by chunk, and store the client state."""
        chunks = chunks_of(ask, int(self.settings["engine"]["chunk"]))
        alone = len(ask.request.clients) == 1
        return join_answers(ask, [a for part in chunks for a in self._tried(part, alone=alone)])

    def _tried(self, ask: Ask, *, alone: bool) -> list[Answer]:
        """Answer for a chunk; if it raises, halve it until the failing clients are isolated."""
        count = len(ask.request.clients)
        once = self.worker.trainer.local.answers_once or self.worker.terms is not None
        try:
            return self._once(ask) if once else [self._trained(ask)]
        except Exception as error:
            if alone:
                raise
            if count == 1:
                return [unanswered(ask, f"{type(error).__name__}: {error}")]
        halves = torch.arange(count).tensor_split(2)
        return [a for half in halves for a in self._tried(part_of(ask, half), alone=False)]

    def _trained(self, ask: Ask) -> Answer:
        # A new key for every computed reply, so that no other request can reproduce its noise.
        self.worker.trainer.answer_key = os.urandom(KEY_BYTES)
        folders = {client: self.folder / str(client) for client in ask.clients}
        checked = checked_of(self.folder, self.worker.trainer)
        for client in folders.keys() - checked:
            check_samples(folders[client], client, self.worker.trainer.task)
            checked.add(client)
        # A resumed server returns to its last checkpoint.
        store = ClientStore(int(self.settings["output"]["checkpoint_every"]) + 1)
        self.worker.store = store
        for folder in folders.values():
            store.absorb(read_store(folder))
        answer = self.worker.train(ask)
        for client, folder in folders.items():
            if stored := store.since(0, client):
                with on_disk(folder):
                    save_tensors(store_file(folder), stored, {}, sync=True)
                    # The state may contain keys of secure aggregation.
                    store_file(folder).chmod(0o600)
        return answer

    def _once(self, ask: Ask) -> list[Answer]:
        """Return each client's reply: the stored one, or a new one."""
        rounds, singles = int(self.settings["rounds"]), chunks_of(ask, 1)
        folders = (self.folder / str(client) for client in ask.clients)
        pairs = zip(folders, singles, strict=True)
        books = [ReplyCache(folder, rounds, single, self.version) for folder, single in pairs]
        found = [book.stored_reply() for book in books]
        if new := [k for k, answer in enumerate(found) if answer is None]:
            of = part_of(ask, torch.tensor(new))
            parts = split_answer(of, self._trained(of), [singles[k] for k in new])
            for k, (single, own) in zip(new, parts, strict=True):
                answer = unanswered(single, own.reason) if isinstance(own, NoAnswer) else own
                books[k].keep(answer)
                found[k] = answer
        return [answer for answer in found if answer is not None]


@lru_cache(maxsize=KEPT)
def checked_of(folder: Path, trainer: CohortTrainer) -> set[int]:
    """Return the set of clients whose samples this process has checked; the caller adds to it."""
    del folder, trainer
    return set()


def store_file(folder: Path) -> Path:
    """Return the file of a client's state."""
    return folder / "kept.safetensors"


def read_store(folder: Path) -> Tree:
    """Read the state of a client; empty if it has not trained yet.

    Args:
        folder: The client's folder.

    Raises:
        CheckpointError: If the file is damaged; there is no copy.
    """
    if not (path := store_file(folder)).is_file():
        return {}
    return load_tensors(path, f"restore it, or remove it and begin anew: {path}")[0]


@lru_cache(maxsize=KEPT)
def worker_of(
    folder: Path, trainer: CohortTrainer, terms: SecAggTerms | None
) -> tuple[Worker, StoredReplica]:
    """Build a node's worker, on its stored base weights or the model's initial ones."""
    holding = StoredReplica(folder, trainer.plan, trainer.device)
    holding.begin(dict(trainer.task.model.named_parameters()))
    return Worker(trainer, holding, terms=terms), holding


@lru_cache(maxsize=KEPT)
def trainer_for(
    settings: str, own: str | None, clients: tuple[int, ...]
) -> tuple[CohortTrainer, SecAggTerms | None]:
    """Build data and model of a run, and the clients' conditions for secure aggregation.

    Args:
        settings: The config of the run, as JSON.
        own: The data settings of the node's configuration, or None.
        clients: The node's clients.

    Raises:
        ConfigError: If the run needs the clients' own data and the node has none, or the node has
            its own and the run needs others.
    """
    plain = json.loads(settings)
    if (plain["data"]["name"] == "own") != (own is not None):
        raise ConfigError(
            f"node-config data={own!r} does not fit data={plain['data']['name']} of the run. "
            "Set data in node-config (a folder, or package.module:function) if and only if "
            "the run has data=own"
        )
    if own is not None:
        data = plain["data"]
        if all(data.get(k) is None for k in ("samples", "test_file", "test_function")):
            data["test_fraction"] = 0.0  # the server holds out no samples of these clients
        data |= {"samples": own, "served": [*clients]}
    return built_from(plain)


def built_from(plain: Plain) -> tuple[CohortTrainer, SecAggTerms | None]:
    """Build data and model of a config, and the clients' conditions for secure aggregation."""
    # Pretrained weights come from the server: pretraining here would be useless.
    builder = TaskBuilder(task_from_plain(plain), pretrain=False)
    know_programs(plain)
    builder.fix_bits()
    return builder.trainer, builder.terms


def know_programs(plain: Plain) -> None:
    """Import the method of a config, to know its client programs: messages import nothing.

    A user's method that is missing here is not needed by clients, or they report it when they are
    asked to run its program.
    """
    name = section(plain, "method").get("name")
    if not is_named(name):
        import_module("fedraclora.strategies.methods")  # which this package does not contain
        return
    with suppress(ConfigError):
        named_object("method", name)
