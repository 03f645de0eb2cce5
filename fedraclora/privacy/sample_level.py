"""Sample-level differential privacy of a client's training: DP-SGD on its trained tensors.

    g~ = (sum_i min(1, C / ||g_i||) g_i + z C N(0, I)) / b

g_i is the gradient of one sample over all trained tensors, as one vector. A factor is small, so the
gradients of all samples are computed directly: every sample is run as a client of its own
(`fedraclora.training.extras.settings`), which is exact for any layer and for sequences.

Batches come from reshuffled epochs, not from Poisson sampling, so there is no amplification by
sampling: in each pass over the data a sample is in one batch, and a pass costs one Gaussian
release. Neighbouring data sets differ in one sample whose gradient is set to zero; the number of a
client's samples is public.

The noise of a client's reply is drawn with a key for this reply only. In a simulation that key
comes from the seed: one process holds all data, and the run shows the cost of privacy,
reproducibly, but protects no one. A real client takes a new key from the operating system for every
reply that it computes (`fedraclora.clients.node`), so that the noise does not cancel between two
replies.

References:
    Abadi et al., *Deep learning with differential privacy*, arXiv 1607.00133. Departures: batches
    and account as said above.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.limits import Inner, Limited, NotNegative, Positive
from fedraclora.privacy.accountant import epsilon
from fedraclora.privacy.secret import normals_of, stream
from fedraclora.rng import hash_key
from fedraclora.schema import Chosen
from fedraclora.tree import Tree

LARGEST_FLOAT = 3e38  # of float32


@dataclass(frozen=True)
class SampleNoise(Limited, Chosen):
    """Clip and noise the gradients of a local step.

    Attributes:
        clip: C, the largest norm of a sample's gradient.
        noise_multiplier: z, the noise on the sum of a batch in units of C; 0 clips only.
        delta: Of the guarantee.
    """

    clip: Positive = 1.0
    noise_multiplier: NotNegative = 1.0
    delta: Inner = 1e-5

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise_multiplier * self.clip < LARGEST_FLOAT:
            raise ConfigError(
                f"noise_multiplier is {self.noise_multiplier} and clip is {self.clip}; their "
                f"product, the noise on a gradient, must stay below {LARGEST_FLOAT:.2g}"
            )

    @classmethod
    @override
    def rows(cls) -> dict[str, type[SampleNoise]]:
        """Mechanisms by the name in a config."""
        return {"gaussian": cls}

    def epsilon(self, passes: int) -> float:
        """Compute epsilon of each sample after ``passes`` passes over the data."""
        return epsilon(self.noise_multiplier, 1.0, passes, self.delta)

    def gradients(self, own: Tree, valid: torch.Tensor, noise: Tree) -> Tree:
        """Compute a batch's noisy gradients from those of its samples.

        The noise is added in float64, like the server's noise, and the sum is then rounded to the
        type of the gradients.

        Args:
            own: [K * b, ...] by name, client after client.
            valid: Which samples count, bool [K, b].
            noise: Standard normals, float64 [K, ...] by name, of `noise`.

        Returns:
            [K, ...] by name.
        """
        K, b = valid.shape
        squares = [g.reshape(K * b, -1).square().sum(dim=1) for g in own.values()]
        norms = torch.stack(squares).sum(dim=0).sqrt()
        share = (self.clip / norms.clamp(min=self.clip)) * valid.reshape(-1).to(norms)
        count = valid.sum(dim=1).clamp(min=1)
        found = {}
        for name, gradient in own.items():
            rows = gradient.reshape(K, b, -1)
            total = torch.bmm(share.reshape(K, 1, b), rows).reshape(K, *gradient.shape[1:])
            if self.noise_multiplier:
                scale = self.noise_multiplier * self.clip
                total = total.double().add(noise[name], alpha=scale)
            mean = total / count.reshape(K, *[1] * (gradient.dim() - 1)).to(total)
            found[name] = mean.to(gradient)
        return found

    def noise(self, like: Mapping[str, torch.Tensor], keys: Sequence[bytes], step: int) -> Tree:
        """Draw standard normals for each client, in the shapes of ``like``: float64, from ChaCha20.

        Args:
            like: Tensors [K, ...] by name.
            keys: Keys of the clients' replies, K of them: `answer_keys`.
            step: The local step.
        """
        if not self.noise_multiplier:
            return {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        found: Tree = {}
        for name, tensor in like.items():
            leaf, count = f"{step}|{name}".encode(), 8 * tensor[0].numel()
            raw = b"".join(stream(hmac.digest(key, leaf, "sha256"), count) for key in keys)
            found[name] = normals_of(raw).reshape(tensor.shape).to(tensor.device)
        return found


def seed_key(seed: int) -> bytes:
    """Derive the key of all noise of a simulation; it can be derived from the seed by anyone."""
    return hash_key(seed, "sample noise").to_bytes(32, "big")


def answer_keys(key: bytes, round_: int, clients: torch.Tensor) -> list[bytes]:
    """Derive the noise keys of some clients (ids, int64) in a round, independent of the others.

    Args:
        key: 32 bytes: `seed_key` in a simulation, new ones for every answer of a real client.
        round_: From 1.
        clients: Ids, int64 [K].
    """
    return [hmac.digest(key, f"{round_}|{c}".encode(), "sha256") for c in clients.tolist()]
