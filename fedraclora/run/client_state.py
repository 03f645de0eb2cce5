"""Store client state between rounds, by client and round, for several generations.

After a failed round, or after a resume from a checkpoint, the server asks a client to train a round
again; the client then starts from its state before that round, not from that of the first attempt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from fedraclora.errors import ShapeError
from fedraclora.tree import Layout, Tree, below, difference

GENERATIONS = 2
KEPT = "store/kept/"  # prefix of `ClientStore.secrets` among tensors
STATES = "store/states/"  # prefix of states of a user's training function
MOMENTS = "moments/"
# Client state that is not part of a client's model.
NO_WEIGHTS = (MOMENTS, "variates/", "residue/")


class StateEntry(NamedTuple):
    """Hold a client's state after a round: one packed row, and its names and shapes."""

    round_: int
    layout: Layout
    row: torch.Tensor


class ClientStore:
    """Store client tensors, as one packed row per client and round.

    Args:
        generations: Rounds for which a client's rows are kept: those that a resumed server may ask
            for again, and the one before.

    Attributes:
        secrets: Values that clients keep between stages of a round only (their keys of secure
            aggregation), by id; never in a checkpoint.
    """

    def __init__(self, generations: int = GENERATIONS) -> None:
        self.generations = generations
        self.secrets: dict[int, bytes] = {}
        self._entries: dict[int, list[StateEntry]] = {}
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
            link: Number of links that have ended: moments of an earlier link are dropped, and the
                client begins with those of ``default``. None: moments are never dropped.

        Returns:
            Tensors [K, ...] by name.

        Raises:
            ShapeError: If the clients' tensors have other names or shapes.
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
        self, client: int, entry: StateEntry, round_: int, layout: Layout, link: int | None
    ) -> Tree:
        """Read a client's state without expired moments; raises as `read` does."""
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
            self._keep(client, StateEntry(round_, layout, row.clone()))

    def latest(self, count: int) -> dict[int, Tree]:
        """Read the tensors of the ``count`` clients that trained last (the smaller id in a tie).

        Moments of optimizers, control variates and quantization errors are not part of a client's
        model and are left out.
        """
        recent = sorted(self._entries.items(), key=lambda item: (-item[1][-1].round_, item[0]))
        return {c: _weights(entries[-1]) for c, entries in recent[:count]}

    def weights_of(self, client: int, round_: int) -> Tree:
        """Read a client's part of its model before a round, as `latest` does; {}: nothing."""
        earlier = [entry for entry in self._entries.get(client, []) if entry.round_ < round_]
        return _weights(earlier[-1]) if earlier else {}

    def state(self) -> Tree:
        """Return tensors for a checkpoint."""
        return _packed(dict(sorted(self._entries.items()))) | self._told(0, [*self._states])

    def part(self, clients: list[int], round_: int) -> Tree:
        """Return clients' state before a round, in the form of `state`, to train elsewhere."""
        earlier = {c: [e for e in self._entries.get(c, []) if e.round_ < round_] for c in clients}
        found = _packed({c: entries[-1:] for c, entries in earlier.items()})
        return found | self._secrets(clients) | self._told(0, clients)

    def absorb(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add the `state` of another store, of clients that trained elsewhere."""
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
        """Return state from a round on, in the form of `state`; None: of every client."""
        one = None if client is None else [client]
        later = {
            c: [e for e in own if e.round_ >= round_]
            for c, own in self._entries.items()
            if one is None or c in one
        }
        found = _packed(dict(sorted(later.items()))) | self._secrets(one or [*self.secrets])
        return found | self._told(round_, one or [*self._states])

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the tensors of `state`."""
        self.secrets = {int(c): bytes(t.tolist()) for c, t in below(tensors, KEPT).items()}
        self._states = {}
        for name, state in below(tensors, STATES).items():
            whose, _, when = name.partition("/")
            self._states.setdefault(int(whose), {})[int(when)] = state.numpy().tobytes()
        found: list[tuple[int, StateEntry]] = []
        group = "store"
        while f"{group}/keys" in tensors:
            values = below(tensors, f"{group}/values/")
            layout = Layout.of(values, skip=1)
            rows = layout.pack(values, lead=1)
            for (client, round_), row in zip(tensors[f"{group}/keys"].tolist(), rows, strict=True):
                found.append((client, StateEntry(round_, layout, row.clone())))
            group += "+"
        self._entries = {}
        for client, entry in sorted(found, key=lambda each: each[1].round_):
            self._entries.setdefault(client, []).append(entry)

    def _secrets(self, clients: list[int]) -> Tree:
        """Convert secrets to tensors of bytes, to be sent with other client state."""
        secrets = {c: self.secrets[c] for c in clients if c in self.secrets}
        return {f"{KEPT}{c}": torch.tensor(list(s), dtype=torch.uint8) for c, s in secrets.items()}

    def _told(self, first: int, clients: list[int]) -> Tree:
        """Convert the states of some clients from a round on to tensors of bytes."""
        each = ((c, r, s) for c in sorted(clients) for r, s in self._states.get(c, {}).items())
        return {
            f"{STATES}{c}/{r}": torch.frombuffer(bytearray(s), dtype=torch.uint8)
            for c, r, s in each
            if r >= first and s
        }

    def _keep(self, client: int, entry: StateEntry) -> None:
        older = [e for e in self._entries.get(client, []) if e.round_ < entry.round_]
        self._entries[client] = [*older, entry][-self.generations :]


def _weights(entry: StateEntry) -> Tree:
    """Select the part that belongs to a client's model."""
    own = entry.layout.unpack(entry.row)
    return {n: t for n, t in own.items() if not n.startswith(NO_WEIGHTS)}


def _packed(clients: Mapping[int, list[StateEntry]]) -> Tree:
    """Convert entries to tensors: those with the same layout together, under a name per layout.

    Usually all have one layout: ``store/keys`` (client and round of each row) and
    ``store/values/<name>``; if trained tensors change, a second layout is ``store+/...`` and so on.
    """
    groups: dict[Layout, list[tuple[int, StateEntry]]] = {}
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
