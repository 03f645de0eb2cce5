"""Sample-level differential privacy of a client's own training: DP-SGD on what it trains.

    g~ = (sum_i min(1, C / ||g_i||) g_i + z C N(0, I)) / b

g_i is the gradient of one sample over all that the client trains, as one vector. A factor is small,
so the gradients of all samples are simply formed: every sample is run as a client of its own
(`fedraclora.training.cohort`), which is exact for any layer and for sequences.

Batches are those of reshuffled epochs, not Poisson samples, so nothing is gained from sampling: in
each pass over the data a sample is in one batch, and a pass costs one Gaussian release. Neighbours
differ in one sample that is put out of action (its gradient is zero); how many samples a client
has is public.

References:
    Abadi et al., *Deep learning with differential privacy*, arXiv 1607.00133. Departures: batches
    and account as said above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedraclora.errors import ConfigError
from fedraclora.privacy.accountant import epsilon
from fedraclora.rng import cohort_bits, hash_key
from fedraclora.tree import Tree

LARGEST = 3e38  # of float32


@dataclass(frozen=True)
class SampleNoise:
    """Clip and noise of a local step.

    Attributes:
        clip: C, the greatest norm of a sample's gradient.
        noise_multiplier: z, the noise on the sum of a batch in units of C; 0 clips only.
        delta: Of the guarantee.
    """

    clip: float = 1.0
    noise_multiplier: float = 1.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse impossible settings; `fedraclora.schema` puts the path before the key."""
        if not 0 < self.clip < math.inf:
            raise ConfigError(f"clip is {self.clip}; a positive finite number is wanted")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(
                f"noise_multiplier is {self.noise_multiplier}; a finite number, 0 or more, is "
                "wanted"
            )
        if not self.noise_multiplier * self.clip < LARGEST:
            raise ConfigError(
                f"noise_multiplier is {self.noise_multiplier} and clip is {self.clip}; their "
                f"product, the noise on a gradient, must stay below {LARGEST:.2g}"
            )
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta is {self.delta}; a number in (0, 1) is wanted")

    @classmethod
    def rows(cls) -> dict[str, type[SampleNoise]]:
        """Mechanisms by the name in a config."""
        return {"gaussian": cls}

    def epsilon(self, passes: int) -> float:
        """Give what ``passes`` passes over the data cost each of the samples."""
        return epsilon(self.noise_multiplier, 1.0, passes, self.delta)

    def gradients(self, own: Tree, valid: torch.Tensor, noise: Tree) -> Tree:
        """Make a batch's gradients of those of its samples.

        Args:
            own: [K * b, ...] by name, client after client.
            valid: Which samples count, bool [K, b].
            noise: Standard normals [K, ...] by name.

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
            total = total.add(noise[name], alpha=self.noise_multiplier * self.clip)
            found[name] = total / count.reshape(K, *[1] * (gradient.dim() - 1)).to(total)
        return found

    def noise(
        self,
        like: Mapping[str, torch.Tensor],
        clients: torch.Tensor,
        seed: int,
        round_: int,
        step: int,
    ) -> Tree:
        """Draw standard normals for each client, in the shapes of ``like``.

        A function of the seed: right for a simulation, where one process holds all data anyway.
        A real client has to give a seed that nobody else can know.

        Args:
            like: Tensors [K, ...] by name.
            clients: Ids, int64 [K].
            seed: From which it is drawn.
            round_: From 1.
            step: The local step.
        """
        if not self.noise_multiplier:
            return {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        found: Tree = {}
        for name, tensor in like.items():
            key = hash_key(seed, "sample noise", round_, name)
            bits = cohort_bits(key, clients, tensor[0].numel(), stream=step)
            normals = torch.special.ndtri((bits.double() + 0.5) * 2.0**-32)
            found[name] = normals.reshape(tensor.shape).to(tensor)
        return found
