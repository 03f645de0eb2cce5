"""Secure aggregation on the wire: stages, keys, shares, and the arithmetic of masks.

A client's vector of integers modulo 2^32 gets one mask of its own, and one for each neighbour; the
neighbour subtracts the same mask from its vector. The sum then contains only the clients' own
masks. Clients send back shares of the seeds of these masks, once the server has named the clients
in the sum.

A client commits in advance (SHA-256) to everything it has to prove later: to its seed with its
keys, and to each share with the sealed shares. A wrong share is therefore detected, together with
the client at fault: the one that sealed it, if its commitments or its secret do not fit, else the
one that sent it back.

Keys are elliptic-curve keys (ECDH on P-384, HKDF), Fernet seals shares, and Flower splits secrets
(Shamir). Flower's masks are not used: their generator reduces a seed to 32 bits and is no cipher. A
mask here is a ChaCha20 stream of the whole key.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os

import numpy as np
import numpy.typing as npt
import torch
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedraclora import flower_internals
from fedraclora.errors import WireError
from fedraclora.privacy.secret import stream
from fedraclora.wire.exchange import Stage
from fedraclora.wire.fields import reading

Words = npt.NDArray[np.uint32]
STAGES = ("keys", "shares", "masked", "unmask")
LARGEST = 2**31 - 1  # whole numbers of either sign, modulo 2^32
CURVE = ec.SECP384R1()  # of keys
SCALAR_BYTES = 48  # of a private key on it
PUBLIC_LENGTH, SEALED_LENGTH, SHARE_LENGTH, MARK_LENGTH = 400, 1000, 200, 64  # of texts, at most


def check_stage(stage: Stage) -> Stage:
    """Reject an unknown stage.

    Raises:
        WireError: Naming it.
    """
    if stage.name not in STAGES:
        raise WireError(f"secure aggregation has no stage {stage.name!r}; its stages are {STAGES}")
    return stage


def check_words(words: torch.Tensor) -> None:
    """Reject masked vectors that are not uint32 [k, P + 2].

    Raises:
        WireError: If dtype or shape differ.
    """
    if words.dtype != torch.uint32 or words.dim() != 2:
        raise WireError(
            "a masked reply is not an array of 32-bit words with one row for each client"
        )


# --- keys ----------------------------------------------------------------------------------------


def new_pair() -> tuple[str, str]:
    """Generate a key pair: private and public, as text."""
    private = ec.generate_private_key(CURVE)
    scalar = private.private_numbers().private_value.to_bytes(SCALAR_BYTES, "big")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = private.public_key().public_bytes(serialization.Encoding.PEM, form)
    return scalar.hex(), public.decode()


def read_public(text: object) -> ec.EllipticCurvePublicKey:
    """Read a public key.

    Raises:
        WireError: If it is not a key of the right kind and curve.
    """
    with reading("what came for a public key"):
        key = serialization.load_pem_public_key(checked_text(text, PUBLIC_LENGTH).encode())
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != CURVE.name:
        raise WireError(f"a public key is not a point of the curve {CURVE.name}")
    return key


def shared_key(private: str, public: str) -> bytes:
    """Agree on a key with the owner of ``public``: 32 bytes in base64, as Fernet takes them."""
    agreed = ec.derive_private_key(int(private, 16), CURVE).exchange(ec.ECDH(), read_public(public))
    key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=None).derive(agreed)
    return base64.urlsafe_b64encode(key)


def is_pair(private: str, public: str) -> bool:
    """Return whether two keys form a pair."""
    try:
        own = ec.derive_private_key(int(private, 16), CURVE)
    except ValueError:
        return False
    return own.public_key().public_numbers() == read_public(public).public_numbers()


def new_seed() -> str:
    """Generate the seed of a client's own mask from the operating system's randomness."""
    return os.urandom(32).hex()


def seal(key: bytes, sender: int, receiver: int, shares: list[str]) -> str:
    """Encrypt shares for a neighbour, with sender and receiver."""
    return Fernet(key).encrypt(json.dumps([sender, receiver, *shares]).encode()).decode()


def unseal(key: bytes, sender: int, receiver: int, text: str) -> list[str]:
    """Decrypt the output of `seal`.

    Raises:
        WireError: If it was not sealed by this sender for this receiver.
    """
    with reading(f"the sealed text of shares of client {sender}"):
        parts = json.loads(Fernet(key).decrypt(text.encode()))
        found = [parts[0], parts[1], *(checked_text(share, SHARE_LENGTH) for share in parts[2:])]
    if found[:2] != [sender, receiver]:
        raise WireError(
            f"the shares of client {found[0]} for client {found[1]} came to another client, or "
            "under another name"
        )
    return found[2:]


def mark(text: str) -> str:
    """Compute the SHA-256 commitment to a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def checked_text(value: object, longest: int) -> str:
    """Check that a received value is a text of limited length.

    Raises:
        WireError: If it is not.
    """
    if not isinstance(value, str) or len(value) > longest:
        kind = f"one of {len(value)}" if isinstance(value, str) else type(value).__name__
        raise WireError(f"a text of at most {longest} characters is wanted, but {kind} came")
    return value


def split_secret(secret: str, threshold: int, count: int) -> list[str]:
    """Split a secret (hexadecimal) so that any ``threshold`` of ``count`` shares give it back."""
    shares = flower_internals.create_shares(bytes.fromhex(secret), threshold, count)
    return [share.hex() for share in shares]


def combine(shares: list[str]) -> str:
    """Rebuild a secret from the shares of `split_secret`.

    Raises:
        WireError: If the shares do not fit together.
    """
    with reading("a secret from its shares"):
        return flower_internals.join_shares([bytes.fromhex(share) for share in shares]).hex()


# --- masks ---------------------------------------------------------------------------------------


def own_mask(seed: str, count: int) -> Words:
    """Compute a client's own mask from its seed."""
    return np.frombuffer(stream(bytes.fromhex(seed), 4 * count), dtype="<u4").astype(np.uint32)


def pair_mask(private: str, public: str, count: int, *, add: bool) -> Words:
    """Compute the mask of a pair of neighbours; one of them adds it, the other subtracts it."""
    key = base64.urlsafe_b64decode(shared_key(private, public))
    words = own_mask(key.hex(), count)
    return words if add else np.negative(words)


def as_words(rows: torch.Tensor) -> npt.NDArray[np.uint32]:
    """Round float64 [k, P], in units of a step, to integers modulo 2^32; off by at most 1/2."""
    whole = torch.round(rows).to(torch.int64).numpy()
    return (whole % 2**32).astype(np.uint32)


def signed(words: Words) -> torch.Tensor:
    """Convert words to signed whole numbers, int64."""
    return torch.from_numpy(words.astype(np.int64)).add_(2**31).remainder_(2**32).sub_(2**31)
