"""LoRA-GA: ``lora_ga_init`` of its PEFT, beside our start from the same gradient.

Its settings are the defaults of its configuration. Its singular vectors come from a randomized SVD
with four iterations, which is complete for a matrix this small. An SVD leaves signs open: vectors
are compared by their squares.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import SCALE, M, N, R, Worst, weight
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.shared.initials import GAMMA, gradient_factors

FILES = tuple(f"peft/src/peft/tuners/lora/{name}.py" for name in ("config", "dora", "layer"))


def compare(code: Repository) -> Findings:
    """Compare both factors without their signs, and the residual weight with those of theirs."""
    worst, G = Worst(), torch_normal(generator(0, "gradient"), M, N)
    B, A = gradient_factors(torch.eye(M).double(), G, R)
    with code.modules(*FILES, root="peft/src/peft/tuners") as [*_, module]:
        base = nn.Linear(N, M, bias=False)
        base.weight.data = weight().float()
        options = SimpleNamespace(direction="ArB2r", scale="stable", stable_gamma=GAMMA)
        held = SimpleNamespace(
            kwargs={"grad": G, "peft_config": options},
            r={"default": R},
            scaling={"default": SCALE},
            get_base_layer=lambda: base,
            lora_A={"default": nn.Linear(N, R, bias=False)},
            lora_B={"default": nn.Linear(R, M, bias=False)},
        )
        module.LoraLayer.lora_ga_init(held, "default")
        left, right = held.lora_B["default"].weight, held.lora_A["default"].weight
        for k in range(R):
            pairs = ((B[:, k], left[:, k]), (A[k], right[k]))
            for label, (ours, theirs) in zip("BA", pairs, strict=True):
                sides = torch.outer(ours, ours), torch.outer(theirs, theirs).detach()
                worst.add(**{label: sides})
        signs = ((B * left).sum(0) * (A * right).sum(1)).sign().detach()
        worst.add(W=(weight() - SCALE * (B * signs) @ A, base.weight.detach()))
    return worst.found


CHECK = CodeCheck(
    "method.init=lora_ga",
    "Outsider565/LoRA-GA",
    "89af7de",
    "factors and residual weight from one gradient",
    compare,
)
