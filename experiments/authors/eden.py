"""EDEN: ``eden_builder`` on blocks of 1024, beside ours of one to four bits.

Its signs are given: ours are on the numbers already. Our levels are integers up to 63, the nearest
ones to a multiple of theirs, so that sums are exact in float32: hence the difference. A few numbers
between two levels take the other one.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.drive import LENGTH, compare_rotated
from fedraclora.experiments.authors.toy import Worst
from fedraclora.protocol.rotated import LEVELS

FILES = ("base", "hadamard", "quantization_constants", "random_p", "eden")
LEVELS_WITHIN = 0.05


def compare(code: Repository) -> Findings:
    """Compare levels, and blocks of each number of bits."""
    worst = Worst()
    paths = [f"torch/{name}.py" for name in FILES]
    with code.modules(*paths, root="torch") as [_, hadamard, constants, _, eden]:
        for bits, (levels, unit) in LEVELS.items():
            theirs = torch.tensor(constants.opt_hn_centroids[bits])
            ours = torch.tensor(levels).double() / unit
            # The scale takes out a common factor.
            worst.add(**{f"eden{bits}/levels": (ours / ours[-1], theirs / theirs[-1])})
            pipeline = eden.eden_builder(bits)

            def coded(x: torch.Tensor, pipeline: Any = pipeline) -> torch.Tensor:
                found: torch.Tensor = pipeline.backward(*pipeline.forward(x))[0]
                return found

            with patch.object(hadamard, "rademacher_like", lambda x, _: torch.ones_like(x)):
                compare_rotated(worst, f"eden{bits}", bits, coded)
    return worst.found


CHECK = CodeCheck(
    "compression=eden2",
    "amitport/EDEN-Distributed-Mean-Estimation",
    "5c7639a",
    f"levels, and blocks of {LENGTH} with one to four bits",
    compare,
    within=LEVELS_WITHIN,
)
