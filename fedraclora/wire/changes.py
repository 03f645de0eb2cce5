"""Send each factor as its quantized difference from its initial value.

    client k sends Q(x_k - x_0),  and the server reads  x_0 + Q(x_k - x_0)

Client and server both know the initial value x_0; for gradients it is zero. The difference is small
compared with the weight, and so is its quantization error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch

from fedraclora.errors import WireError
from fedraclora.protocol.coding import decompressed
from fedraclora.protocol.instructions import opening_rows
from fedraclora.protocol.method import RoundInstructions
from fedraclora.protocol.quantized import WIDTHS, decode, encode, row_bytes
from fedraclora.protocol.rank_budgets import uploaded_mask, uploaded_numbers
from fedraclora.rng import generator
from fedraclora.tree import Tree

Kept = slice | torch.Tensor  # which numbers of its row a client sends
AT_ONCE = 1 << 20  # numbers that are rounded together


@dataclass
class CodedRows:
    """Hold rows as they are sent, in the order of the clients.

    Attributes:
        codes: The bytes of each client, uint8.
        errors: Quantization error of each update, relative to its norm.
    """

    codes: list[torch.Tensor] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ChangeCodec:
    """Encode and decode the updates of clients.

    Attributes:
        kind: Number format, one of `fedraclora.protocol.quantized.ROUNDED`.
        sent: The round's instructions.
        base: The weights from which clients train.
        clients: The clients of ``sent``, int64 [K], in ascending order.
    """

    kind: str
    sent: RoundInstructions
    base: Tree
    clients: torch.Tensor

    def encode(
        self,
        rows: torch.Tensor,
        seed: int,
        round_: int,
        coded: CodedRows,
        residues: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Quantize the rows of all clients.

        Args:
            rows: Trained values, float64 [K, P].
            seed: Of the run.
            round_: From 1.
            coded: Takes the bytes and the errors.
            residues: Added to the updates, float64 [K, P], and then replaced by the quantization
                error, with rounding to the nearest. None: no residues, and stochastic rounding.

        Returns:
            The rows as the server will read them, float64 [K, P].
        """
        found, starts = rows.clone(), self._starts(self.clients)
        purpose = seed, "uplink", round_, self.sent.program.stream
        for index, kept, sizes in self._alike(torch.arange(len(rows))):
            start = _of(starts, index)[:, kept]
            change = _of(rows, index)[:, kept] - start
            if residues is not None:
                change += _of(residues, index)[:, kept]
            rngs = [generator(*purpose, client) for client in self.clients[index].tolist()]
            nearest = residues is not None
            codes = encode(change, sizes, self.kind, rngs, nearest=nearest, again=False)
            back = decode(codes, sizes, self.kind, axes=2, again=False)
            put(found, index, kept, start + back)
            left = torch.sub(change, back, out=back)
            if residues is not None:
                put(residues, index, kept, left)
            coded.codes += codes
            errors = left.norm(dim=1) / change.norm(dim=1)
            coded.errors += errors.nan_to_num(0.0, posinf=0.0).tolist()
        return found

    def decode(
        self,
        raw: torch.Tensor,
        clients: torch.Tensor,
        dtype: torch.dtype,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decode the rows of some clients from their bytes.

        Args:
            raw: uint8 [bytes].
            clients: Their ids, int64 [k].
            dtype: Of the rows.
            lengths: Bytes that each client sent, int64 [k], if they are coded.

        Returns:
            [k, P]; with rank budgets the parts of the rows that were sent, one after another.

        Raises:
            WireError: If the number of bytes is wrong, or a frame is damaged.
        """
        places = torch.searchsorted(self.clients, clients)
        parts = [
            (index, kept, sizes, row_bytes(tuple(sizes), self.kind))
            for index, kept, sizes in self._alike(places)
        ]
        if lengths is not None:
            wanted = [each for index, *_, each in parts for _ in index]
            raw = decompressed(raw, lengths, clients, wanted)
        size = sum(len(index) * each for index, *_, each in parts)
        if raw.dtype != torch.uint8 or tuple(raw.shape) != (size,):
            raise WireError(
                f"numbers of the kind {self.kind} came as {raw.dtype} of the shape "
                f"{tuple(raw.shape)}, expected {size} bytes"
            )
        found, starts, at = [torch.zeros(0, dtype=dtype)], self._starts(self.clients), 0
        for index, kept, sizes, each in parts:
            end = at + len(index) * each
            rows = raw[at:end].reshape(len(index), each)
            change = decode(rows, sizes, self.kind, axes=2, again=False)
            found.append((starts[index][:, kept] + change).to(dtype).flatten())
            at = end
        numbers = torch.cat(found)
        whole = self.sent.ranks is None
        return numbers.reshape(len(clients), self.sent.layout.size) if whole else numbers

    def _alike(self, places: torch.Tensor) -> Iterator[tuple[torch.Tensor, Kept, list[int]]]:
        """Group clients, by their places, that send the same numbers, up to a limit of size."""
        if self.sent.ranks is None:
            size = max(1, AT_ONCE // max(1, self.sent.layout.size))
            for index in places.split(size):
                yield index, slice(None), self.sent.layout.sizes
            return
        parts = [*_parts(self.sent, len(self.clients))]
        yield from ((place[None], *parts[place]) for place in places)

    def _starts(self, clients: torch.Tensor) -> torch.Tensor:
        """Compute where these clients start, float64 [k, P]."""
        layout, places = self.sent.layout, torch.searchsorted(self.clients, clients)
        start = torch.zeros(layout.size, dtype=torch.float64)
        if self.sent.program.trains:
            start = opening_rows(self.sent, self.base, layout, places).double()
        return start.expand(len(clients), layout.size)


def uploaded_bytes(sent: RoundInstructions, cohort: int, kind: str) -> torch.Tensor:
    """Return the bytes of the numbers that each client of a round sends back, int64 [K]."""
    if kind in WIDTHS:
        return uploaded_numbers(sent, cohort) * WIDTHS[kind]
    each = [row_bytes(tuple(sizes), kind) for _, sizes in _parts(sent, cohort)]
    return torch.tensor(each, dtype=torch.int64)


def _parts(sent: RoundInstructions, cohort: int) -> Iterator[tuple[Kept, list[int]]]:
    """Yield for each client which numbers of its row it sends, and how many of each tensor."""
    sizes = [prod(slot.shape) for slot in sent.uploaded().values()]
    masks = uploaded_mask(sent, torch.arange(cohort))
    if masks is None:
        yield from [(slice(None), sizes)] * cohort
        return
    for mask in masks:
        yield mask, [int(part.sum()) for part in mask.split(sizes)]


def _of(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return some rows, in ascending order; without a copy if these are all."""
    return rows if len(index) == len(rows) else rows[index]


def put(rows: torch.Tensor, index: torch.Tensor, kept: Kept, values: torch.Tensor) -> None:
    """Put values into some rows, at the kept places of each."""
    if isinstance(kept, slice):  # all numbers
        rows[index] = values
        return
    some = rows[index]
    some[:, kept] = values
    rows[index] = some
