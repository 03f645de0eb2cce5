"""What stays at the clients between rounds, keyed by client and round, some generations deep.

A round that fails, or a server that is restored from a checkpoint, asks a client to train a round
again; the client then starts from what it had before that round, not from what it has tried.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedraclora.errors import ShapeError
from fedraclora.tree import Layout, Tree

GENERATIONS = 2
KEPT = "store/kept/"  # of the names of `ClientStore.secrets` among tensors
NO_WEIGHTS = ("moments/", "variates/")  # what clients keep that is no part of their models


class ClientStore:
    """Tensors that clients keep, as one packed row per client and round.

    Args:
        generations: Rounds of which a client's rows are kept: those that a restored server may
            ask for again, and the one before.

    Attributes:
        secrets: What clients keep from stage to stage of a round and no longer (their keys of
            secure aggregation), by id; in no checkpoint.
    """

    def __init__(self, generations: int = GENERATIONS) -> None:
        self.generations = generations
        self.secrets: dict[int, bytes] = {}
        self._layout: Layout | None = None
        self._kept: dict[int, list[tuple[int, torch.Tensor]]] = {}

    def read(self, clients: torch.Tensor, round_: int, default: Tree) -> Tree:
        """Give what each client held before a round.

        Args:
            clients: Ids, int64 [K].
            round_: The round that starts.
            default: For clients that hold nothing yet, without a client axis.

        Returns:
            Tensors [K, ...] by name.

        Raises:
            ShapeError: If clients hold tensors of other names or shapes: numbers that came from
                one tensor are none of another's.
        """
        layout, held = Layout.of(default), self._layout
        if held is not None and held != layout:
            raise ShapeError(
                f"clients hold {dict(held.shapes)} from earlier rounds, but in round {round_} "
                f"{dict(layout.shapes)} is asked of them"
            )
        first = layout.pack(default)
        rows = [self._before(client, round_, first) for client in clients.tolist()]
        return layout.unpack(torch.stack(rows))

    def stage(self, clients: torch.Tensor, round_: int, values: Tree) -> None:
        """Keep what clients hold after a round; older rounds than the one before it are dropped.

        Args:
            clients: Ids, int64 [K].
            round_: The round that they trained.
            values: Tensors [K, ...] by name.
        """
        self._layout = Layout.of(values, skip=1)
        rows = self._layout.pack(values, lead=1).cpu()
        for client, row in zip(clients.tolist(), rows, strict=True):
            self._keep(client, round_, row.clone())

    def latest(self, count: int) -> dict[int, Tree]:
        """Give the tensors of the ``count`` clients that trained last (the smaller id in a tie).

        Moments of optimisers and control variates are no part of a client's model and are left out.
        """
        if self._layout is None:
            return {}
        recent = sorted(self._kept.items(), key=lambda item: (-item[1][-1][0], item[0]))
        held = {c: self._layout.unpack(kept[-1][1]) for c, kept in recent[:count]}
        return {
            c: {n: t for n, t in own.items() if not n.startswith(NO_WEIGHTS)}
            for c, own in held.items()
        }

    def state(self) -> Tree:
        """Tensors for a checkpoint."""
        return self._packed([(c, r, t) for c, kept in sorted(self._kept.items()) for r, t in kept])

    def part(self, clients: list[int], round_: int) -> Tree:
        """What clients held before a round, in the form of `state`: to train elsewhere."""
        held = {c: [(r, t) for r, t in self._kept.get(c, []) if r < round_] for c in clients}
        packed = self._packed([(c, *kept[-1]) for c, kept in held.items() if kept])
        return packed | self._secrets(clients)

    def absorb(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep what clients hold that trained elsewhere: the `state` of another store."""
        other = ClientStore()
        other.restore(tensors)
        self._layout = other._layout or self._layout
        self.secrets |= other.secrets
        for client, kept in other._kept.items():
            for round_, row in kept:
                self._keep(client, round_, row)

    def since(self, round_: int) -> Tree:
        """What was staged in a round or later, in the form of `state`."""
        entries = [(c, r, t) for c, kept in sorted(self._kept.items()) for r, t in kept]
        kept = self._packed([entry for entry in entries if entry[1] >= round_])
        return kept | self._secrets(list(self.secrets))

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the tensors of `state` back."""
        prefix = "store/values/"
        values = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self._kept = {}
        self.secrets = {
            int(n.removeprefix(KEPT)): bytes(t.tolist())
            for n, t in tensors.items()
            if n.startswith(KEPT)
        }
        self._layout = Layout.of(values, skip=1) if values else None
        if self._layout is None:
            return
        rows = self._layout.pack(values, lead=1)
        for (client, round_), row in zip(tensors["store/keys"].tolist(), rows, strict=True):
            self._kept.setdefault(client, []).append((round_, row.clone()))

    def _secrets(self, clients: list[int]) -> Tree:
        """Write secrets as tensors of bytes: to travel with what else a client holds."""
        held = {c: self.secrets[c] for c in clients if c in self.secrets}
        return {f"{KEPT}{c}": torch.tensor(list(s), dtype=torch.uint8) for c, s in held.items()}

    def _packed(self, entries: list[tuple[int, int, torch.Tensor]]) -> Tree:
        if self._layout is None or not entries:
            return {}
        names = self._layout.unpack(torch.stack([t for _, _, t in entries]))
        keys = torch.tensor([(c, r) for c, r, _ in entries], dtype=torch.int64)
        return {"store/keys": keys} | {f"store/values/{n}": t for n, t in names.items()}

    def _keep(self, client: int, round_: int, row: torch.Tensor) -> None:
        older = [(r, t) for r, t in self._kept.get(client, []) if r < round_]
        self._kept[client] = [*older, (round_, row)][-self.generations :]

    def _before(self, client: int, round_: int, first: torch.Tensor) -> torch.Tensor:
        held = [t for r, t in self._kept.get(client, []) if r < round_]
        return held[-1].to(first.device) if held else first
