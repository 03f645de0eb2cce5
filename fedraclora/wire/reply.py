"""What comes back from a chunk of clients: their rows, or float64 sums of blocks of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import RecordDict

from fedraclora.aggregate import SUM_BLOCK, Refusal, block_sums, check_rows
from fedraclora.errors import WireError
from fedraclora.sampling import client_weights
from fedraclora.training.trial import Trial
from fedraclora.tree import Layout
from fedraclora.wire.downlink import Order
from fedraclora.wire.records import (
    array_record,
    header_record,
    read_array,
    read_header,
    read_layout,
    read_vectors,
    vector_record,
)

WANTED = {"clients", "losses", "samples", "steps"}


@dataclass(frozen=True)
class Reply:
    """What a chunk sent back: what its clients trained, and who failed.

    Attributes:
        round_, version: Of the message that is answered.
        first: Place of the chunk's first client in the cohort.
        clients: Ids of the clients whose work is here, int64 [k].
        losses, samples, steps: One value per client [k].
        numbers: Their rows [k, P]; under rank budgets what is left of the rows, one after
            another; or float64 sums of the chunk's blocks [blocks, P].
        reduced: Whether they are sums.
        failures: Why a client trained nothing, by id.
        refused: Clients that a sum leaves out, because their numbers cannot be used.
        notes: Sentences for the ledger.
    """

    round_: int
    version: int
    first: int
    clients: torch.Tensor
    losses: torch.Tensor
    samples: torch.Tensor
    steps: torch.Tensor
    numbers: torch.Tensor
    reduced: bool
    failures: dict[int, str]
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def pack_trial(
    trial: Trial | None,
    order: Order,
    clients: torch.Tensor,
    layout: Layout,
    failures: Mapping[int, str],
    notes: list[str],
    mask: torch.Tensor | None = None,
) -> RecordDict:
    """Write what a chunk brought back.

    Args:
        trial: Of the clients that trained, or None if none did.
        order: What was asked. With ``reduce``, rows are checked and summed here, so that what
            goes back does not grow with the chunk.
        clients: Who trained, int64 [k], a part of ``order.clients``.
        layout: What each client sends.
        failures: Why a client trained nothing, by id.
        notes: Sentences for the ledger.
        mask: Which numbers of its row each client sends, bool [k, P]; None: all.
    """
    if trial is None:  # every client of the chunk failed
        none = torch.zeros(0, dtype=torch.int64)
        trial = Trial({n: torch.empty(0, *s) for n, s in layout.shapes}, none.double(), none, none)
    numbers = layout.pack({n: trial.trained[n] for n, _ in layout.shapes}, lead=1)
    refused: list[Refusal] = []
    vectors = {"clients": clients, "losses": trial.losses}
    vectors |= {"samples": trial.samples, "steps": trial.steps}
    if order.reduce is not None:
        weights = client_weights(order.reduce, trial.samples)
        refused = check_rows(clients, weights, trial.losses, numbers)
        kept = ~torch.isin(clients, torch.tensor([r.client for r in refused], dtype=torch.int64))
        places = torch.searchsorted(order.clients, clients[kept])
        sums = block_sums(numbers[kept.to(numbers.device)], weights[kept], places)
        numbers = torch.zeros(-(-len(order.clients) // SUM_BLOCK), layout.size).to(sums)
        numbers[: len(sums)] = sums
        vectors = {name: vector[kept] for name, vector in vectors.items()}
    elif mask is not None:
        numbers = numbers[mask.to(numbers.device)]
    header = {
        "round": order.round_,
        "version": order.version,
        "failures": {str(c): r for c, r in failures.items()},
        "refused": [[r.client, r.reason] for r in refused],
        "reduced": order.reduce is not None,
        "notes": notes,
        "layout": layout.shapes,
    }
    chunk = vector_record(vectors)
    chunk["first"] = order.first
    return RecordDict(
        {"config": header_record(header), "arrays": array_record(numbers), "chunk": chunk}
    )


def unpack_trial(content: RecordDict, layout: Layout, ranks: torch.Tensor | None = None) -> Reply:
    """Read a reply back and hold it against what was asked.

    Args:
        content: The reply.
        layout: What a client sends, budgets aside.
        ranks: The cohort's rank budgets, if it has any: then rows are cut, and their sizes are
            left to `fedraclora.ranks.widen`.

    Raises:
        WireError: If the layout is not the one that was asked for, or numbers are missing.
    """
    header, vectors = read_header(content), read_vectors(content)
    numbers = read_array(content, "arrays")
    sent = read_layout(header["layout"])
    if sent != layout:
        raise WireError(
            f"round {header['round']}: clients {vectors['clients'].tolist()} sent "
            f"{dict(sent.shapes)}, wanted {dict(layout.shapes)}"
        )
    if vectors.keys() != WANTED:
        raise WireError(f"round {header['round']}: {[*vectors]} came, {[*WANTED]} were wanted")
    count = len(vectors["clients"])
    rows = len(numbers) if header["reduced"] else count
    cut = ranks is not None and not header["reduced"]
    fits = numbers.dim() == 1 if cut else tuple(numbers.shape) == (rows, layout.size)
    if not fits or {len(v) for v in vectors.values()} != {count}:
        raise WireError(
            f"round {header['round']}: rows {tuple(numbers.shape)}, wanted {(rows, layout.size)}, "
            f"with {count} ids, losses and sizes; {[len(v) for v in vectors.values()]} came"
        )
    return Reply(
        header["round"],
        header["version"],
        int(str(content["chunk"]["first"])),
        vectors["clients"],
        vectors["losses"],
        vectors["samples"],
        vectors["steps"],
        numbers,
        bool(header["reduced"]),
        {int(c): r for c, r in header["failures"].items()},
        [Refusal(int(c), r) for c, r in header["refused"]],
        header["notes"],
    )
