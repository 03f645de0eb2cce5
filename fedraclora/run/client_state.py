"""Store client state between rounds, by client and round, for several generations.

A round that fails, or a server that is restored from a checkpoint, asks a client to train a round
again; the client then starts from what it had before that round, not from what it has tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from fedraclora.errors import ShapeError
from fedraclora.tree import Layout, Tree, below, difference

GENERATIONS = 2
KEPT = "store/kept/"  # of the names of `ClientStore.secrets` among tensors
STATES = "store/states/"  # of those of what a user's training function keeps
MOMENTS = "moments/"
# What clients keep that is no part of their models.
NO_WEIGHTS = (MOMENTS, "variates/", "residue/")


class Entry(NamedTuple):
    """State of a client after a round: one packed row, and the names and shapes in it."""

    round_: int
    layout: Layout
    row: torch.Tensor


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
        self._entries: dict[int, list[Entry]] = {}
        self._states: dict[int, dict[int, bytes]] = {}

    def recall(self, client: int, round_: int) -> bytes:
        """Return the state that custom client code stored for a client before a round."""
        earlier = {r: state for r, state in self._states.get(client, {}).items() if r < round_}
        return earlier[max(earlier)] if earlier else b""

    def remember(self, client: int, round_: int, state: bytes) -> None:
        """Store the state that custom client code keeps for a client, after a round."""
        kept = {r: old for r, old in self._states.get(client, {}).items() if r < round_}
        newest = sorted({**kept, round_: state}.items())[-self.generations :]
        self._states[client] = dict(newest)

    def read(
        self, clients: torch.Tensor, round_: int, default: Tree, link: int | None = None
    ) -> Tree:
        """Read the state of each client before a round.

        Args:
            clients: Ids, int64 [K].
            round_: The round that starts.
            default: For clients that hold nothing yet, without a client axis.
            link: The link in progress: moments of another, whose tensors were others, have ended
                with it, and the client begins with those of ``default``. None: they never end.

        Returns:
            Tensors [K, ...] by name.

        Raises:
            ShapeError: If clients hold tensors of other names or shapes: numbers that came from
                one tensor are none of another's.
        """
        layout = Layout.of(default)
        first = layout.pack(default)
        rows = []
        for client in clients.tolist():
            earlier = [entry for entry in self._entries.get(client, []) if entry.round_ < round_]
            if not earlier:
                rows.append(first)
            elif earlier[-1].layout == layout:
                rows.append(earlier[-1].row.to(first.device))
            else:
                values = default | self._lasting(client, earlier[-1], round_, layout, link)
                rows.append(layout.pack({n: t.to(first.device) for n, t in values.items()}))
        return layout.unpack(torch.stack(rows))

    def _lasting(
        self, client: int, entry: Entry, round_: int, layout: Layout, link: int | None
    ) -> Tree:
        """Read a client's state without moments that have ended; raises as `read` does."""
        values = entry.layout.unpack(entry.row)
        of_link = values.get(f"{MOMENTS}link")
        if link is not None and of_link is not None and int(of_link) != link:
            values = {n: t for n, t in values.items() if not n.startswith(MOMENTS)}
            layout = Layout(tuple(s for s in layout.shapes if not s[0].startswith(MOMENTS)))
        if (found := Layout.of(values)) != layout:
            raise ShapeError(
                f"client {client}: its tensors of round {entry.round_} differ from those that "
                f"round {round_} needs: {difference(found, layout)}. Keep names and shapes of "
                "client state the same in all rounds; only optimizer moments may change, "
                "with the merge (local.optimizer_state=merge)"
            )
        return values

    def stage(self, clients: torch.Tensor, round_: int, values: Tree) -> None:
        """Store client state after a round; rounds older than the previous one are dropped.

        Args:
            clients: Ids, int64 [K].
            round_: The round that they trained.
            values: Tensors [K, ...] by name.
        """
        layout = Layout.of(values, skip=1)
        rows = layout.pack(values, lead=1).cpu()
        for client, row in zip(clients.tolist(), rows, strict=True):
            self._keep(client, Entry(round_, layout, row.clone()))

    def latest(self, count: int) -> dict[int, Tree]:
        """Read the tensors of the ``count`` clients that trained last (the smaller id in a tie).

        Moments of optimizers, control variates and what rounding left are no part of a client's
        model and are left out.
        """
        recent = sorted(self._entries.items(), key=lambda item: (-item[1][-1].round_, item[0]))
        return {c: _weights(entries[-1]) for c, entries in recent[:count]}

    def weights_of(self, client: int, round_: int) -> Tree:
        """Read what a client held of its model before a round, as `latest` does; {}: nothing."""
        earlier = [entry for entry in self._entries.get(client, []) if entry.round_ < round_]
        return _weights(earlier[-1]) if earlier else {}

    def state(self) -> Tree:
        """Tensors for a checkpoint."""
        return _packed(dict(sorted(self._entries.items()))) | self._told(0, [*self._states])

    def part(self, clients: list[int], round_: int) -> Tree:
        """What clients held before a round, in the form of `state`: to train elsewhere."""
        earlier = {c: [e for e in self._entries.get(c, []) if e.round_ < round_] for c in clients}
        found = _packed({c: entries[-1:] for c, entries in earlier.items()})
        return found | self._secrets(clients) | self._told(0, clients)

    def absorb(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over the `state` of another store, of clients that trained elsewhere."""
        other = ClientStore()
        other.restore(tensors)
        self.secrets |= other.secrets
        for client, states in other._states.items():
            for round_, state in sorted(states.items()):
                self.remember(client, round_, state)
        for client, entries in other._entries.items():
            for entry in entries:
                self._keep(client, entry)

    def since(self, round_: int, client: int | None = None) -> Tree:
        """What was staged in a round or later, in the form of `state`; None: of every client."""
        one = None if client is None else [client]
        later = {
            c: [e for e in own if e.round_ >= round_]
            for c, own in self._entries.items()
            if one is None or c in one
        }
        found = _packed(dict(sorted(later.items()))) | self._secrets(one or [*self.secrets])
        return found | self._told(round_, one or [*self._states])

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the tensors of `state` back."""
        self.secrets = {int(c): bytes(t.tolist()) for c, t in below(tensors, KEPT).items()}
        self._states = {}
        for name, state in below(tensors, STATES).items():
            whose, _, when = name.partition("/")
            self._states.setdefault(int(whose), {})[int(when)] = state.numpy().tobytes()
        found: list[tuple[int, Entry]] = []
        group = "store"
        while f"{group}/keys" in tensors:
            values = below(tensors, f"{group}/values/")
            layout = Layout.of(values, skip=1)
            rows = layout.pack(values, lead=1)
            for (client, round_), row in zip(tensors[f"{group}/keys"].tolist(), rows, strict=True):
                found.append((client, Entry(round_, layout, row.clone())))
            group += "+"
        self._entries = {}
        for client, entry in sorted(found, key=lambda each: each[1].round_):
            self._entries.setdefault(client, []).append(entry)

    def _secrets(self, clients: list[int]) -> Tree:
        """Write secrets as tensors of bytes: to travel with what else a client holds."""
        secrets = {c: self.secrets[c] for c in clients if c in self.secrets}
        return {f"{KEPT}{c}": torch.tensor(list(s), dtype=torch.uint8) for c, s in secrets.items()}

    def _told(self, first: int, clients: list[int]) -> Tree:
        """Write the states of some clients from a round on as tensors of bytes."""
        each = ((c, r, s) for c in sorted(clients) for r, s in self._states.get(c, {}).items())
        return {
            f"{STATES}{c}/{r}": torch.frombuffer(bytearray(s), dtype=torch.uint8)
            for c, r, s in each
            if r >= first and s
        }

    def _keep(self, client: int, entry: Entry) -> None:
        older = [e for e in self._entries.get(client, []) if e.round_ < entry.round_]
        self._entries[client] = [*older, entry][-self.generations :]


def _weights(entry: Entry) -> Tree:
    """Select what is a part of a client's model."""
    own = entry.layout.unpack(entry.row)
    return {n: t for n, t in own.items() if not n.startswith(NO_WEIGHTS)}


def _packed(clients: Mapping[int, list[Entry]]) -> Tree:
    """Write entries as tensors: those of one layout together, each layout under a name of its own.

    Where all are alike, as they are unless what is trained changes, that is ``store/keys`` (client
    and round of each row) and ``store/values/<name>``; a second layout is ``store+/...`` and so on.
    """
    groups: dict[Layout, list[tuple[int, Entry]]] = {}
    for client, entries in clients.items():
        for entry in entries:
            groups.setdefault(entry.layout, []).append((client, entry))
    found: Tree = {}
    group = "store"
    for layout, entries_ in groups.items():
        keys = [(client, entry.round_) for client, entry in entries_]
        found[f"{group}/keys"] = torch.tensor(keys, dtype=torch.int64)
        values = layout.unpack(torch.stack([entry.row for _, entry in entries_]))
        found |= {f"{group}/values/{n}": t for n, t in values.items()}
        group += "+"
    return found
