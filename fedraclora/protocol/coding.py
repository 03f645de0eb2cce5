"""Compress quantized numbers losslessly by entropy coding: one zstd frame for each client.

On the uplink each client's message is one frame; on the downlink the shared part is one, and so is
each tensor of merges and weights, whose bytes are counted one by one.

No number changes. If a frame is not shorter than the bytes, the bytes are sent; the reader knows
the uncoded size, and recognizes them by their length. A frame states that size, which is checked
before memory is allocated, and ends in a checksum, since one wrong bit would change all numbers
after it. Its size depends on the version of the library; no decision depends on it.

References:
    Collet and Kucherawy, *Zstandard Compression and the application/zstd Media Type*, RFC 8878.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import zstandard

from fedraclora.errors import WireError

NONE, ZSTD = "none", "zstd"
LEVEL = 1  # higher levels search for longer repeats, which such codes do not have


def compressed(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Compress the bytes of each client, uint8 [bytes], unless that makes them longer."""
    writer, found = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True), []
    for raw in parts:
        frame = writer.compress(raw.numpy().tobytes())
        shorter = len(frame) < len(raw)
        found.append(torch.from_numpy(np.frombuffer(frame, np.uint8).copy()) if shorter else raw)
    return found


def decompressed(
    raw: torch.Tensor, lengths: torch.Tensor, clients: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """Decompress the output of `compressed` for some clients, joined.

    Args:
        raw: uint8 [bytes].
        lengths: Bytes of each client, int64 [k].
        clients: Their ids, int64 [k].
        sizes: Bytes of each client without coding.

    Raises:
        WireError: If lengths do not match the bytes; or, naming the client, if a frame is damaged
            or of another size.
    """
    each = lengths.tolist()
    if raw.dtype != torch.uint8 or raw.dim() != 1 or min(each, default=0) < 0:
        raise WireError(f"coded numbers came as {raw.dtype} of the shape {tuple(raw.shape)}")
    if len(each) != len(sizes) or sum(each) != len(raw):
        raise WireError(f"{len(raw)} bytes came, of {len(sizes)} clients who have {each}")
    found = [torch.zeros(0, dtype=torch.uint8)]
    for part, client, size in zip(raw.split(each), clients.tolist(), sizes, strict=True):
        try:
            found.append(unframed(part, size))
        except WireError as error:
            raise WireError(f"the coded numbers of client {client}: {error}") from error
    return torch.cat(found)


def unframed(raw: torch.Tensor, size: int) -> torch.Tensor:
    """Decompress a frame to ``size`` bytes, uint8 [size]; return bytes of that length unchanged.

    Raises:
        WireError: If it is neither, or the frame is damaged.
    """
    if len(raw) == size:
        return raw
    frame, wanted = raw.cpu().numpy().tobytes(), f"{size} bytes, or a shorter frame of these,"
    try:
        told = zstandard.get_frame_parameters(frame) if len(frame) < size else None
        if told is None or told.content_size != size or not told.has_checksum:
            found = "" if told is None else f", framed {told.content_size}"
            raise WireError(f"{len(frame)} bytes{found}, expected {wanted}")
        reader = zstandard.ZstdDecompressor()
        whole = reader.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"{len(frame)} bytes, expected {wanted} ({error})") from error
    return torch.from_numpy(np.frombuffer(whole, np.uint8).copy())
