"""Run the client's side of secure aggregation: keys, shares, a masked vector, and shares again.

A client answers the stages of a round in order, sends one masked vector per round, and reveals for
each neighbour either the share of its own mask or that of its key, never both: both together would
unmask that neighbour. The number of neighbours, and of those that must agree, come from the
client's own config, never from a message.

It helps to unmask a sum of measurements only if it and its neighbours in that sum are enough
clients with samples to measure on. Each client says so in an encrypted message beside its shares,
so that the server does not learn it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from fedraclora.errors import ClientError, FedRacLoraError
from fedraclora.privacy.secagg import FEW, SecAggTerms
from fedraclora.run.client_state import ClientStore
from fedraclora.wire.answers import StageAnswer
from fedraclora.wire.exchange import Stage, TrainRequest
from fedraclora.wire.secagg import (
    Words,
    as_words,
    mark,
    new_pair,
    new_seed,
    own_mask,
    pair_mask,
    read_public,
    seal,
    shared_key,
    split_secret,
    unseal,
)

Memory = dict[str, Any]
BEFORE = {"shares": "keys", "masked": "shares", "unmask": "masked"}
MEASUREMENTS = "measured"  # stage of a sum of measurements, with other keys than that of updates
HOLDS, HOLDS_NONE = "1", "0"  # texts of equal length: a client has samples to measure on, or none
# Errors of an invalid message from another machine.
DAMAGED = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def answer_stage(
    request: TrainRequest,
    stage: Stage,
    store: ClientStore,
    terms: SecAggTerms,
    measurers: Collection[int] = (),
) -> StageAnswer:
    """Answer a stage of secure aggregation without training.

    Args:
        request: The request, with the round.
        stage: The stage.
        store: Where clients keep their keys between stages.
        terms: The clients' conditions.
        measurers: Clients with samples to measure on.
    """
    round_ = request.round_
    steps = {"keys": _keys, "shares": _shares, "unmask": _unmask}
    answers: dict[int, Any] = {}

    def answer(client: int) -> None:
        memory = _recall(store, client, round_, stage)
        if stage.name == "keys" and MEASUREMENTS in stage.settings:
            memory["measurers"] = [client] if client in measurers else []
        answers[client] = steps[stage.name](client, memory, stage.data[client], terms)
        _remember(store, client, memory, stage)

    failures = _each(stage.data, answer)
    return _answer(request, Stage(stage.name, {}, answers), failures, sorted(answers))


def _each(clients: Iterable[int], answer: Callable[[int], None]) -> dict[int, str]:
    """Run a function for each client; collect reasons of failures, by id."""
    failures: dict[int, str] = {}
    for client in clients:
        try:
            answer(client)
        except FedRacLoraError as error:
            failures[client] = str(error)
        except DAMAGED as error:
            failures[client] = f"client {client} cannot read its message ({error!r})"
    return failures


def _answer(
    request: TrainRequest,
    stage: Stage,
    failures: dict[int, str],
    clients: list[int],
    words: Words | None = None,
    notes: Sequence[str] = (),
) -> StageAnswer:
    """Build the reply in a stage; ``words``: uint32 [k, P + 2], of these clients."""
    return StageAnswer(
        round_=request.round_,
        version=request.version,
        clients=torch.tensor(clients, dtype=torch.int64),
        failures=failures,
        notes=[*notes],
        stage=stage.through_json,
        words=None if words is None else torch.from_numpy(words),
    )


def _recall(store: ClientStore, client: int, round_: int, asked: Stage) -> Memory:
    """Read a client's stored keys, and check that this stage is the next one.

    Sums of updates and of measurements have separate keys.

    Raises:
        ClientError: If it is not, or if the client has already sent its masked vector in this round
            or a later one: two sums with the same update would reveal the others' difference.
    """
    memory: Memory = json.loads(store.secrets.get(client) or b"{}")
    stage = asked.name
    memory = memory.get(MEASUREMENTS, {}) if MEASUREMENTS in asked.settings else memory
    last = int(memory.get("answered", 0))
    if round_ <= last and not (stage == "unmask" and round_ == last):
        stands = f"has sent its masked vector in round {last}"
    elif stage == "keys":
        return {"round": round_, "answered": last}
    elif (memory.get("round"), memory.get("after")) == (round_, BEFORE[stage]):
        return memory
    else:
        stands = f"has finished {memory.get('after')} of round {memory.get('round')}"
    raise ClientError(
        f"client {client} was asked for the stage {stage} of round {round_}, but {stands}. A "
        "client answers a stage once"
    )


def _remember(store: ClientStore, client: int, memory: Memory, asked: Stage) -> None:
    """Store the data of the next stage; secrets are deleted as soon as no stage needs them."""
    stage, whole = asked.name, json.loads(store.secrets.get(client) or b"{}")
    memory["after"] = stage
    if stage == "masked":
        memory["answered"] = memory["round"]
    fields = {
        "masked": ("round", "after", "answered", "near", "held", "threshold", "measurers"),
        "unmask": ("answered",),
    }
    if stage in fields:
        memory = {key: memory[key] for key in fields[stage] if key in memory}
    other = {key: own for key, own in whole.items() if key == MEASUREMENTS}
    kept = whole | {MEASUREMENTS: memory} if MEASUREMENTS in asked.settings else memory | other
    store.secrets[client] = json.dumps(kept).encode()


def _keys(_client: int, memory: Memory, _data: Any, _terms: SecAggTerms) -> Any:
    """Create the keys of a round: for masks, and to encrypt shares."""
    memory["mask"], mask = new_pair()
    memory["box"], box = new_pair()
    memory["seed"] = new_seed()
    return {"mask": mask, "box": box, "seed": mark(memory["seed"])}


def _shares(client: int, memory: Memory, data: Any, terms: SecAggTerms) -> Any:
    """Split key and seed among the neighbours."""
    keys = {int(c): {name: str(k[name]) for name in ("mask", "box")} for c, k in data.items()}
    if client in keys or len(keys) < terms.neighbours:
        raise ClientError(
            f"client {client}: the server named {len(keys)} neighbours for secure "
            f"aggregation. A client needs at least {terms.neighbours}, and may not be its own "
            "neighbour"
        )
    for key in keys.values():
        read_public(key["mask"])
    threshold = terms.config.shares(len(keys))
    memory["keys"], memory["threshold"] = keys, threshold
    seeds, scalars = (split_secret(memory[name], threshold, len(keys)) for name in ("seed", "mask"))
    notes = [HOLDS if memory["measurers"] else HOLDS_NONE] if "measurers" in memory else []
    return {
        other: [
            seal(shared_key(memory["box"], key["box"]), client, other, [seed, scalar, *notes]),
            mark(seed),
            mark(scalar),
        ]
        for (other, key), seed, scalar in zip(keys.items(), seeds, scalars, strict=True)
    }


def _unmask(client: int, memory: Memory, data: Any, terms: SecAggTerms) -> Any:
    """Collect shares of the seeds of clients in the sum, and of the keys of the others."""
    alive, gone = ([int(c) for c in data[key]] for key in ("alive", "gone"))
    near, shares = {*memory["near"]}, memory["held"]
    if len({*alive, *gone}) != len(alive) + len(gone) or not {*alive, *gone} <= near:
        raise ClientError(
            f"client {client}: the server asked for shares of {alive} (clients in the sum) "
            f"and of {gone} (clients that dropped out). It may ask only for the neighbours "
            f"{sorted(near)}, each once"
        )
    if len(alive) < memory["threshold"]:
        raise ClientError(
            f"client {client}: the server asked it to unmask a sum with only {len(alive)} of "
            f"its neighbours. At least {memory['threshold']} are needed"
        )
    if "measurers" in memory and len({*memory["measurers"]} & {client, *alive}) < terms.measurers:
        raise ClientError(FEW.format(terms.measurers))
    return {
        "alive": {str(c): shares[str(c)][0] for c in alive if str(c) in shares},
        "gone": {str(c): shares[str(c)][1] for c in gone if str(c) in shares},
    }


def of_updates(
    request: TrainRequest,
    stage: Stage,
    terms: SecAggTerms,
    trained: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> dict[int, Callable[[], Words]]:
    """Return a function that encodes the updates of clients, for `masked_vectors`.

    Args:
        request: The request.
        stage: The stage of the message, with the step.
        terms: The clients' conditions.
        trained: Ids int64 [k], updates float64 [k, P], weights float64 [k], and which updates were
            longer than the clip, bool [k].
    """
    settings = request.clip, stage.settings, terms
    return {
        client: partial(_whole, update, float(weight), bool(cut), *settings)
        for client, update, weight, cut in zip(trained[0].tolist(), *trained[1:], strict=True)
    }


def masked_vectors(
    request: TrainRequest,
    stage: Stage,
    store: ClientStore,
    vectors: Mapping[int, Callable[[], Words]],
    failures: dict[int, str],
    notes: Sequence[str] = (),
    told: Mapping[str, Any] | None = None,
) -> StageAnswer:
    """Build the masked vectors of all clients that can send one.

    A client that cannot decrypt a share names its sender, and sends no vector: the server then asks
    again, and says whether to continue without that share or without that neighbour.

    Args:
        request: The request.
        stage: The stage of the message, with the step.
        store: Where clients keep their keys.
        vectors: Encodes a client's values as integers, by id.
        failures: Why a client has none, by id.
        notes: Sentences for the ledger.
        told: A description of the vectors.
    """
    rows: dict[int, Words] = {}
    unopened: dict[int, Any] = {}

    def answer(client: int) -> None:
        if client not in stage.data:
            raise ClientError(
                f"client {client} dropped out of secure aggregation at an earlier stage"
            )
        memory = _recall(store, client, request.round_, stage)
        if closed := _open(client, memory, stage.data[client]):
            unopened[client] = {"unopened": closed}
            return
        row = _masked(client, memory, vectors[client]())
        _remember(store, client, memory, stage)
        rows[client] = row

    failures = failures | _each(vectors, answer)
    masked = np.stack([*rows.values()]) if rows else np.zeros((0, 0), dtype=np.uint32)
    said = Stage("masked", dict(told or {}), unopened)
    return _answer(request, said, failures, [*rows], masked, notes)


def _open(client: int, memory: Memory, data: Mapping[str, Any]) -> list[int]:
    """Decrypt a client's received shares; return the senders of shares that cannot be decrypted."""
    senders = {int(c): [str(word) for word in sealed] for c, sealed in data["shares"].items()}
    near = [*senders, *(int(c) for c in data["without"])]
    strangers = {*near} - {int(c) for c in memory["keys"]}
    if strangers or len({*near}) != len(near):
        raise ClientError(
            f"client {client}: the server named the neighbours {near}. It may name only "
            f"{[*memory['keys']]}, each once"
        )
    if len(near) < memory["threshold"]:
        raise ClientError(
            f"client {client}: only {len(near)} of its neighbours are left. At least "
            f"{memory['threshold']} are needed"
        )
    memory["near"], memory["held"], closed = near, {}, []
    for other, (text, *marks) in senders.items():
        try:
            box = shared_key(memory["box"], memory["keys"][str(other)]["box"])
            sealed = unseal(box, other, client, text)
        except FedRacLoraError:
            sealed = []
        shares, notes = sealed[:2], sealed[2:]
        if [mark(share) for share in shares] == marks:
            memory["held"][str(other)] = shares
            if notes == [HOLDS] and "measurers" in memory:
                memory["measurers"].append(other)
        else:
            closed.append(other)
    return closed


def _whole(
    update: torch.Tensor,
    weight: float,
    cut: bool,
    clip: float | None,
    settings: Mapping[str, Any],
    terms: SecAggTerms,
) -> Words:
    """Encode a weighted update as integer steps modulo 2^32, followed by two numbers.

    They are its weight, and 1 if it was longer than the clip: their sums count the clients and the
    clipped updates, without naming a client.

    The update is clipped once more, in float64: trained numbers are rounded to the precision of the
    message, which may make a clipped update from a distant start longer than the clip, and a sum of
    such updates would overflow.

    Args:
        update: float64 [P].
        weight: The client's weight.
        cut: Whether the update was longer than the clip before clipping.
        clip: The largest norm of an update; None: that of the config.
        settings: Settings of the stage: the step.
        terms: The clients' conditions.
    """
    if not bool(torch.isfinite(update).all()):
        raise ClientError("its update contains NaN or infinity. Lower local.lr")
    most = terms.config.max_weight
    if not 0 < weight <= most or weight != int(weight):
        raise ClientError(
            f"secure.max_weight={most:g}: the client's weight is not a whole number from 1 to "
            "this limit. Raise it to the largest number of samples of a client"
        )
    norm, longest = float(update.norm()), terms.config.clip if clip is None else float(clip)
    if norm > longest:
        update = update * (longest / norm)
    step = float(settings["step"])
    beside = torch.tensor([weight, float(cut and terms.counted)])
    whole: Words = as_words(torch.cat([update * weight / step, beside])[None])[0]
    return whole


def _masked(client: int, memory: Memory, whole: Words) -> Words:
    """Add a client's own mask and those of its pairs to integers."""
    row = whole + own_mask(memory["seed"], len(whole))
    for other in memory["near"]:
        public = memory["keys"][str(other)]["mask"]
        row = row + pair_mask(memory["mask"], public, len(row), add=client > other)
    return row
