"""GaLore: steps of ``galore_torch.AdamW``, for the same gradients of a wide and a tall matrix.

The public code of the federated paper (navyanshmahla/fedftg) hands the optimizer a flat list of
parameters, so that it never projects: it is plain AdamW. So the client's optimizer is held to
GaLore itself; the server takes a mean. An SVD leaves the signs of its vectors open, and moments
outlive a projection: so both get those of one SVD, `signed`.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import Worst
from fedraclora.lowrank.algebra import fix_signs
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.methods.galore_average import GaLore, ProjectGradients
from fedraclora.training.extras.settings import LocalSettings

SHAPES = {"wide": (6, 9), "tall": (9, 5)}
RANK, GAP, PROJECTED, STEPS, LR = 3, 3, 0.25, 8, 0.02
EPS = 1e-12  # which the code adds before the correction of the second moment, torch after it
FILES = ("galore_projector", "galore_projector_tensor", "adamw")
SVD = torch.linalg.svd


def signed(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute an SVD whose vectors have the signs that ours have."""
    U, S, Vh = SVD(*args, **options)
    if U.shape[-1] == Vh.shape[-2]:
        smaller_first = U.shape[-2] <= Vh.shape[-1]
        U, Vh = fix_signs(U, Vh) if smaller_first else [x.mT for x in fix_signs(Vh.mT, U.mT)][::-1]
    return U, S, Vh


def compare(code: Repository) -> Findings:
    """Compare the weights after each step; every `GAP` steps the projection is computed anew."""
    rng, worst = generator(0, "galore"), Worst()
    start = {name: torch_normal(rng, *shape) for name, shape in SHAPES.items()}
    values = {name: value[None].clone() for name, value in start.items()}
    program = ProjectGradients(GAP, PROJECTED, dict.fromkeys(SHAPES, RANK), ())
    dense = {name: to_train(shape) for name, shape in SHAPES.items()}
    sent = RoundInstructions(dense=dense, program=program)
    local = LocalSettings(optimizer="adamw", lr=LR, eps=EPS, weight_decay=0.0)
    rates = dict.fromkeys(SHAPES, LR)
    ours = GaLore(local, values, rates, {}, program, program.projections(sent))
    paths = [f"galore_torch/{name}.py" for name in FILES]
    unused = ("tensorly", "tensorly.decomposition")
    with code.modules(*paths, unused=unused) as [*_, module], patch("torch.linalg.svd", signed):
        parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        options = {"rank": RANK, "update_proj_gap": GAP, "scale": PROJECTED, "proj_type": "std"}
        groups = [{"params": [p], **options} for p in parameters.values()]
        theirs = module.AdamW(groups, lr=LR, eps=EPS, no_deprecation_warning=True)
        for _ in range(STEPS):
            gradients = {name: torch_normal(rng, *shape) for name, shape in SHAPES.items()}
            for name, parameter in parameters.items():
                parameter.grad = gradients[name]
            theirs.step()
            ours.step({name: value[None] for name, value in gradients.items()})
            worst.add(**{n: (values[n][0], parameters[n].detach()) for n in SHAPES})
    return worst.found


CHECK = CodeCheck(
    "galore_average",
    "jiaweizzhao/GaLore",
    "2cc66f8",
    f"the client's optimizer, {STEPS} steps",
    compare,
)
