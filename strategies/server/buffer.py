"""Replies on their way between rounds, and the step of the server that merges those that came.

    W <- W + sum_i w_i (1 + tau_i)^(-1/2) Delta_i / sum_i w_i      over the replies of the buffer

Delta_i is the change of a client's weights since it started, tau_i the rounds that have passed
since, w_i its aggregation weight. A reply belongs to the sketch under which it was trained, so
replies of one round are merged with that round's own sketch: a link for each (`Link.rest`), exact,
since every B stands beside its A. What lives on in the same coordinates (FFA-LoRA, FedAvg-LoRA,
full weights) goes together.

Everything that a later round needs is in the moments of the state, so that it is in the checkpoint.

References:
    Nguyen et al., *Federated learning with buffered asynchronous aggregation*, AISTATS 2022, arXiv
    2106.06639 (FedBuff; its discount of stale replies, ``(1 + tau)^(-1/2)``, known from summaries).
    Links by sketch are ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch

from fedraclora.devices.asynchronous import PendingClient
from fedraclora.errors import ConfigError
from fedraclora.protocol.downlink import opening_rows
from fedraclora.protocol.method import Downlink, Link, Method, State
from fedraclora.protocol.quantised import FULL
from fedraclora.protocol.uplinks import Uplinks, weighted_sum
from fedraclora.tree import Tree
from fedraclora.wire.downlink import (
    COEFFICIENTS,
    TrainRequest,
    pack_downlink,
    unpack_downlink,
    uplink_layout,
)
from fedraclora.wire.records import header_record, read_header, read_tree, tree_record

PREFIX = "buffer/"
# Fields that older headers lack.
NEWER = {"extras": {}, "pools": {}, "uplink": FULL, "kind": FULL, "feedback": False, "turn": None}
NEWER |= {COEFFICIENTS: []}
OLDER = ("variates", "lifted")  # fields of headers of older releases, which were empty here


@dataclass(frozen=True)
class Batch:
    """Replies to one downlink.

    Attributes:
        round_: Of the downlink.
        sent: The downlink.
        flights: Who answers when, in ascending order of client.
        rows: Their changes since they started, [K, P].
        weights: Aggregation weights, float64 [K].
    """

    round_: int
    sent: Downlink
    flights: tuple[PendingClient, ...]
    rows: torch.Tensor
    weights: torch.Tensor

    def select(self, flights: frozenset[PendingClient]) -> Batch:
        """Keep these clients alone."""
        kept = [i for i, flight in enumerate(self.flights) if flight in flights]
        places = torch.tensor(kept, dtype=torch.int64)
        return replace(
            self,
            flights=tuple(self.flights[i] for i in kept),
            rows=self.rows[places],
            weights=self.weights[places],
        )


def batch_of(got: Uplinks, sent: Downlink, base: Tree, started: tuple[PendingClient, ...]) -> Batch:
    """Make a batch of the replies of a round, of all clients that answer sooner or later.

    Args:
        got: What they sent.
        sent: What they were asked.
        base: What they trained from.
        started: Who started in the round; those whose training failed are left out.
    """
    start = opening_rows(sent, base, got.layout, torch.arange(len(got.clients)))
    own = {f.client: f for f in started if not f.lost}
    flights = tuple(own[client] for client in got.clients.tolist())
    rows = got.rows().cpu()
    return Batch(flights[0].round_, sent, flights, rows - start.to(rows), got.weights)


def write_batches(batches: list[Batch], lost: tuple[PendingClient, ...], dtype: str) -> Tree:
    """Write what is on its way as tensors; batches without clients are left out.

    Args:
        batches: Of the rounds that are not over.
        lost: Clients that will vanish.
        dtype: Of numbers on the wire.
    """
    found: Tree = {}
    for batch in batches:
        if not batch.flights:
            continue
        clients = torch.tensor([f.client for f in batch.flights])
        packed = pack_downlink(batch.sent, TrainRequest(batch.round_, 0, 1.0, clients), dtype)
        text, arrays = json.dumps(read_header(packed)).encode(), read_tree(packed, "arrays")
        found |= {
            f"{PREFIX}{batch.round_}/clients": clients,
            f"{PREFIX}{batch.round_}/lands": _lands(batch.flights),
            f"{PREFIX}{batch.round_}/rows": batch.rows,
            f"{PREFIX}{batch.round_}/weights": batch.weights,
            f"{PREFIX}{batch.round_}/header": torch.tensor(list(text), dtype=torch.uint8),
            f"{PREFIX}{batch.round_}/numbers": arrays["flat"].clone(),
        }
        if COEFFICIENTS in arrays:
            found[f"{PREFIX}{batch.round_}/{COEFFICIENTS}"] = arrays[COEFFICIENTS].clone()
    if lost:
        found[f"{PREFIX}lost/who"] = torch.tensor([(f.client, f.round_) for f in lost])
        found[f"{PREFIX}lost/lands"] = _lands(lost)
    return found


def _lands(flights: tuple[PendingClient, ...]) -> torch.Tensor:
    return torch.tensor([f.lands for f in flights], dtype=torch.float64)


def read_batches(state: State) -> tuple[list[Batch], tuple[PendingClient, ...]]:
    """Read the batches of `write_batches`, in ascending order of round, and who will vanish."""
    stored = {n.removeprefix(PREFIX): t for n, t in state.moments.items() if n.startswith(PREFIX)}
    rounds = sorted({int(n.partition("/")[0]) for n in stored if not n.startswith("lost/")})
    batches = []
    for round_ in rounds:
        clients, lands = stored[f"{round_}/clients"], stored[f"{round_}/lands"]
        header = json.loads(bytes(stored[f"{round_}/header"].tolist()))
        header = NEWER | {k: v for k, v in header.items() if k not in OLDER}
        content = pack_downlink(Downlink(), TrainRequest(round_, 0, 1.0, clients), "float32")
        content["config"] = header_record(header)
        arrays = {"flat": stored[f"{round_}/numbers"]}
        if (coefficients := stored.get(f"{round_}/{COEFFICIENTS}")) is not None:
            arrays[COEFFICIENTS] = coefficients
        content["arrays"] = tree_record(arrays)
        sent, _ = unpack_downlink(content)
        flights = tuple(
            PendingClient(at, k, round_)
            for k, at in zip(clients.tolist(), lands.tolist(), strict=True)
        )
        rows, weights = stored[f"{round_}/rows"], stored[f"{round_}/weights"]
        batches.append(Batch(round_, sent, flights, rows, weights))
    lost: tuple[PendingClient, ...] = ()
    if "lost/who" in stored:
        pairs = zip(stored["lost/who"].tolist(), stored["lost/lands"].tolist(), strict=True)
        lost = tuple(PendingClient(at, k, round_, lost=True) for (k, round_), at in pairs)
    return batches, lost


def merge(method: Method, state: State, batches: list[Batch], now: Downlink, round_: int) -> State:
    """Take the step of the server.

    Args:
        method: Closes a round for each downlink.
        state: Before the step.
        batches: The replies that came, in ascending order of round.
        now: What this round asks: stale replies in the same coordinates go with it.
        round_: From 1.

    Returns:
        The next state, with one link and the staleness in its report.

    Raises:
        ConfigError: If a stale reply cannot be merged with its own downlink.
    """
    total = float(sum(batch.weights.sum() for batch in batches))
    ages = [float(round_ - b.round_) for b in batches for _ in b.flights]
    own = [[b] for b in batches if b.sent.link != now.link]
    together = [b for b in batches if b.sent.link == now.link]
    links: list[Link] = []
    for group in [*own, *([together] if together else [])]:
        _check_late(own, state)
        sent = now if group is together else group[0].sent
        state = _closed(method, state, sent, group, total, round_)
        links.append(state.link or Link())
    _check_late(own, state)
    first, *others = links
    report = {"staleness": sum(ages) / len(ages), "staleness_max": max(ages)}
    return replace(
        state, link=replace(first, rest=tuple(others)), report={"merged": float(len(ages))} | report
    )


def _check_late(late: list[list[Batch]], state: State) -> None:
    """Reject replies to older downlinks where these depended on more than the weights."""
    if late and state.depends_on_past:
        raise ConfigError(
            "a reply to an older downlink came (system.buffer), but what this method carries from "
            "round to round, or takes from the last link, has changed since; take a method that "
            "merges in every round and carries nothing (fed_rac_lora with method.resample_every=1) "
            "or never merges (null)"
        )


def _closed(
    method: Method, state: State, sent: Downlink, group: list[Batch], total: float, round_: int
) -> State:
    """Close a round for replies in the same coordinates: start + their discounted changes."""
    layout = uplink_layout(sent)
    if any(uplink_layout(batch.sent) != layout for batch in group):
        raise ConfigError(
            "system.buffer is set, but what this method trains changes from round to round, so "
            "that a late reply does not fit the round in which it comes; take another method, or "
            "system.buffer=null"
        )
    rows = torch.cat([batch.rows for batch in group])
    late = torch.cat([torch.full((len(b.flights),), float(round_ - b.round_)) for b in group])
    weights = torch.cat([batch.weights for batch in group]) / (1 + late.double()).sqrt()
    start = opening_rows(sent, state.base, layout, torch.arange(1))
    clients = torch.tensor([f.client for b in group for f in b.flights])
    mean = start + weighted_sum(rows, weights) / total
    got = Uplinks(clients, weights, layout, summed=mean, denominator=1.0)
    return method.close_round(state, sent, got)
