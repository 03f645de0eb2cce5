"""DRIVE: ``drive_compress`` and ``drive_decompress`` on blocks of 1024, beside ours of one bit.

Their code rotates by signs of a generator and a Hadamard matrix: it is given numbers that have our
signs already. Their scale is a float32, ours has 8 bits, so that it is compared by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import Worst
from fedraclora.protocol.kinds import Draws
from fedraclora.protocol.rotated import LENGTHS, Rotated, signs_of
from fedraclora.rng import generator, torch_normal

BLOCKS, LENGTH = 8, LENGTHS[0]
OF_A_SCALE = 2.0**-7  # of 8 bits, the first of which is 1

Coded = Callable[[torch.Tensor], torch.Tensor]


def rotated(bits: int, theirs: Coded) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Quantize blocks, some with long tails; yield the block, ours and theirs, with our signs.

    Args:
        bits: A number.
        theirs: Quantizes a block without signs of its own.
    """
    rng, kind = generator(0, "blocks"), Rotated(bits)
    for number in range(BLOCKS):
        x = torch_normal(rng, LENGTH)
        x = x.exp() if number % 2 else x
        draws = Draws([generator(number, "rounding")], nearest=False, again=False)
        packed = kind.encode(x.numpy()[None], [LENGTH], draws)
        found = torch.from_numpy(kind.decode(packed, [LENGTH], again=False)[0])
        D = torch.from_numpy(signs_of(packed[:, :2].copy().view("<u2"))[0, 0].astype(np.float64))
        yield x, found, D * theirs((D * x).float()).double()


def compare_rotated(worst: Worst, name: str, bits: int, theirs: Coded) -> None:
    """Compare directions of blocks, their errors, and of lengths what 8 bits do not explain."""
    for x, ours, other in rotated(bits, theirs):
        lengths = ours.norm(), other.norm()
        angles = [torch.linalg.vector_norm(x / x.norm() - y / y.norm()) for y in (ours, other)]
        worst.add(**{f"{name}/error": (angles[0], angles[1])})
        off = max(float((lengths[0] / lengths[1] - 1).abs()) - OF_A_SCALE, 0.0)
        worst.add(**{name: (ours / lengths[0], other / lengths[1])})
        worst.add(**{f"{name}/length": (torch.tensor(1 + off), torch.ones(()))})


def compare(code: Repository) -> Findings:
    """Compare blocks of one bit."""
    worst = Worst()
    with code.modules("drive_torch/drive.py", root="drive_torch") as [module]:

        def theirs(x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = module.drive_decompress(*module.drive_compress(x.clone()))
            return found

        compare_rotated(worst, "eden1", 1, theirs)
    return worst.found


CHECK = CodeCheck(
    "compression=eden1",
    "amitport/DRIVE-One-bit-Distributed-Mean-Estimation",
    "f87a915",
    f"blocks of {LENGTH}, up to the bits of a scale",
    compare,
)
