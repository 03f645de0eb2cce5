"""Draw secret randomness from a key: for noise, sampling and masks.

The seed of a run is public, so that anyone could subtract noise drawn from it. Draws for protection
use a key of 32 bytes from the operating system instead. The key is kept in a file that only its
owner can read, so that a resumed run draws the same numbers.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedraclora.errors import CheckpointError
from fedraclora.tree import to_numpy

KEY_BYTES = 32
KEY_FILE = Path("private") / "noise.key"


def stream(key: bytes, count: int) -> bytes:
    """Expand a key of 32 bytes to ``count`` bytes (ChaCha20); a key serves one stream."""
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(count))


def uniforms_of(raw: bytes) -> torch.Tensor:
    """Convert each 8 bytes to one float64 in (0, 1), from 52 of their bits."""
    bits = np.frombuffer(raw, dtype="<u8") >> np.uint64(12)
    return (torch.from_numpy(bits.astype(np.float64)) + 0.5) * 2.0**-52


def normals_of(raw: bytes) -> torch.Tensor:
    """Convert each 8 bytes to one standard normal, float64: the quantile of `uniforms_of`."""
    normals: torch.Tensor = torch.special.ndtri(uniforms_of(raw))
    return normals


class Secret:
    """Draw random numbers from a key.

    Args:
        key: 32 bytes; None: new ones from the operating system. A test passes its own.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._key = os.urandom(KEY_BYTES) if key is None else key

    @classmethod
    def of_folder(cls, folder: Path, *, resume: bool) -> Secret:
        """Read the key of a run, or create it.

        Args:
            folder: The run folder.
            resume: Whether the run is resumed: then the key must exist.

        Raises:
            CheckpointError: If it is missing, or not a key.
        """
        path = folder / KEY_FILE
        if not path.exists():
            if resume:
                raise CheckpointError(
                    f"{path} is missing: without its key a private run cannot go on; restore it "
                    "from a copy, or start the run anew without resume"
                )
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(os.urandom(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
        key = path.read_bytes()
        if len(key) != KEY_BYTES:
            raise CheckpointError(f"{path} holds {len(key)} bytes; a key has {KEY_BYTES}")
        return cls(key)

    def derive(self, purpose: str, round_: int, about: torch.Tensor | None = None) -> bytes:
        """Derive the key of one draw (HMAC-SHA256), which reveals nothing about other keys.

        Args:
            purpose: The name of the draw.
            round_: The round.
            about: Further inputs of the draw; different inputs give independent draws.
        """
        data = b"" if about is None else to_numpy(about).tobytes()
        text = f"{purpose}|{round_}|".encode() + hashlib.sha256(data).digest()
        return hmac.digest(self._key, text, "sha256")

    def chosen(self, count: int, chance: float, purpose: str, round_: int) -> torch.Tensor:
        """Sample ``count`` clients independently, each with ``chance``: ids ascending, int64."""
        if chance >= 1:
            return torch.arange(count)
        coins = uniforms_of(stream(self.derive(purpose, round_), 8 * count))
        return torch.nonzero(coins < chance).flatten()

    def normals(
        self, count: int, purpose: str, round_: int, about: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Draw standard normals, float64 [count]; arguments as for `derive`."""
        return normals_of(stream(self.derive(purpose, round_, about), 8 * count))
