"""The client's side of secure aggregation: keys, shares, a masked vector, and shares again.

A client answers each stage once and in order, and gives of each neighbour either the share of its
own mask or that of its key, never both: with both anyone could unmask that neighbour.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict

from fedraclora.aggregate import finite
from fedraclora.clientstore import ClientStore
from fedraclora.errors import ClientError, FedRacLoraError
from fedraclora.wire import Order, round_of
from fedraclora.wire.records import header_record, vector_record
from fedraclora.wire.secagg import (
    Stage,
    Words,
    new_pair,
    new_seed,
    own_mask,
    pair_mask,
    quantised,
    seal,
    shared_key,
    split,
    stage_message,
    unseal,
)

Memory = dict[str, Any]


def answer_stage(content: RecordDict, stage: Stage, store: ClientStore) -> RecordDict:
    """Answer a stage in which nobody trains.

    Args:
        content: The message.
        stage: Its stage.
        store: Where clients keep their keys from stage to stage.
    """
    round_ = round_of(content)
    steps = {"keys": _keys, "shares": _shares, "unmask": _unmask}
    said: dict[int, Any] = {}
    failures: dict[int, str] = {}
    for client, data in stage.data.items():
        try:
            memory = _recall(store, client, round_, stage.name)
            said[client] = steps[stage.name](client, memory, data)
            memory["after"] = stage.name
            store.secrets[client] = json.dumps(memory).encode()
            if stage.name == "unmask":
                store.secrets[client] = b""  # the keys of a round serve once
        except FedRacLoraError as error:
            failures[client] = str(error)
    return stage_message(round_, Stage(stage.name, {}, said), failures)


def _recall(store: ClientStore, client: int, round_: int, stage: str) -> Memory:
    """Give what a client remembers, if this is the stage that comes next."""
    if stage == "keys":
        return {"round": round_}
    memory: Memory = json.loads(store.secrets.get(client) or b"{}")
    before = {"shares": "keys", "masked": "shares", "unmask": "masked"}[stage]
    if (memory.get("round"), memory.get("after")) != (round_, before):
        raise ClientError(
            f"client {client} was asked for the stage {stage} of round {round_}, but stands after "
            f"{memory.get('after')} of round {memory.get('round')}: it does not answer twice"
        )
    return memory


def _keys(client: int, memory: Memory, data: Any) -> Any:
    """Make the keys of a round: for masks, and to seal shares."""
    del client, data
    memory["mask"], mask = new_pair()
    memory["box"], box = new_pair()
    memory["seed"] = new_seed()
    return {"mask": mask, "box": box}


def _shares(client: int, memory: Memory, data: Any) -> Any:
    """Split key and seed among the neighbours."""
    keys = {int(c): k for c, k in data["keys"].items()}
    threshold = int(data["threshold"])
    if client in keys or not len(keys) / 2 < threshold <= len(keys):
        raise ClientError(
            f"client {client} was told to trust {threshold} of {len(keys)} neighbours; more than "
            "half of them, itself left out, are wanted"
        )
    memory["keys"], memory["threshold"] = data["keys"], threshold
    seeds, scalars = (split(memory[name], threshold, len(keys)) for name in ("seed", "mask"))
    return {
        other: seal(shared_key(memory["box"], key["box"]), client, other, [seed, scalar])
        for (other, key), seed, scalar in zip(keys.items(), seeds, scalars, strict=True)
    }


def _unmask(client: int, memory: Memory, data: Any) -> Any:
    """Give the seeds' shares of those who are in the sum, the keys' shares of those who are not."""
    alive, gone = ([int(c) for c in data[key]] for key in ("alive", "gone"))
    held = memory["held"]
    if set(alive) & set(gone) or not {*map(str, alive), *map(str, gone)} <= set(held):
        raise ClientError(
            f"client {client} was asked for shares of {alive} and {gone}; each of its neighbours "
            f"{[*held]} once is wanted"
        )
    if len(alive) < memory["threshold"]:
        raise ClientError(
            f"client {client} was asked to unmask a sum with {len(alive)} of its neighbours; "
            f"{memory['threshold']} or more are wanted"
        )
    return {
        "alive": {str(c): held[str(c)][0] for c in alive},
        "gone": {str(c): held[str(c)][1] for c in gone},
    }


def masked_reply(
    order: Order,
    stage: Stage,
    store: ClientStore,
    trained: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    failures: dict[int, str],
    notes: list[str],
) -> RecordDict:
    """Write the masked vectors of those who trained, were told their neighbours' shares, and may.

    Args:
        order: What was asked.
        stage: The stage of the message, with clip, step and the greatest weight.
        store: Where clients keep their keys.
        trained: Ids int64 [k], updates float64 [k, P] within the clip, and weights float64 [k].
        failures: Why a client trained nothing, by id.
        notes: Sentences for the ledger.
    """
    clients, updates, weights = trained
    failures, rows, kept = dict(failures), [], []
    sound = finite(updates)
    for i, client in enumerate(clients.tolist()):
        try:
            if client not in stage.data:
                raise ClientError(f"client {client} left secure aggregation at an earlier stage")
            if not sound[i]:
                raise ClientError("its update has a NaN or an infinity; lower local.lr")
            memory = _recall(store, client, order.round_, "masked")
            rows.append(_masked(client, memory, stage, updates[i : i + 1], float(weights[i])))
            kept.append(client)
            memory["after"] = "masked"
            store.secrets[client] = json.dumps(memory).encode()
        except FedRacLoraError as error:
            failures[client] = str(error)
    words = np.stack(rows) if rows else np.zeros((0, updates.shape[1] + 1), dtype=np.uint32)
    header = {"round": order.round_, "version": order.version, "notes": notes}
    header["failures"] = {str(c): why for c, why in failures.items()}
    arrays = ArrayRecord()
    arrays["flat"] = Array(words)
    return RecordDict(
        {
            "config": header_record(header),
            "arrays": arrays,
            "chunk": vector_record({"clients": torch.tensor(kept, dtype=torch.int64)}),
            "secure": Stage("masked", {}, {}).record(),
        }
    )


def _masked(
    client: int, memory: Memory, stage: Stage, update: torch.Tensor, weight: float
) -> Words:
    """Quantise one weighted update, and hide it with the weight behind it."""
    most, step = float(stage.settings["max_weight"]), float(stage.settings["step"])
    if not 0 < weight <= most or weight != int(weight):
        raise ClientError(
            f"its weight is {weight:g}; a whole number up to secure.max_weight={most:g} is wanted"
        )
    senders = {int(c): text for c, text in stage.data[client].items()}
    if not {str(c) for c in senders} <= set(memory["keys"]):
        raise ClientError(f"client {client} was sent shares by strangers: {[*senders]}")
    if len(senders) < memory["threshold"]:
        raise ClientError(
            f"only {len(senders)} neighbours of client {client} are left; "
            f"{memory['threshold']} or more are wanted"
        )
    memory["held"] = {}
    row: Words = quantised(torch.cat([update * weight / step, torch.tensor([[weight]])], dim=1))[0]
    row = row + own_mask(memory["seed"], len(row))
    for other, text in senders.items():
        keys = memory["keys"][str(other)]
        box = shared_key(memory["box"], keys["box"])
        memory["held"][str(other)] = unseal(box, other, client, text)
        row = row + pair_mask(memory["mask"], keys["mask"], len(row), add=client > other)
    return row
