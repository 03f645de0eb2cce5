"""AdaLoRA: ``RankAllocator`` on two layers, for the same factors and changes, beside our cuts.

Ours has no singular values: theirs are one here in each step, and have no gradient, so that they
score nothing. What theirs sets to zero may return; ours is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fedraclora.allocation import AdaLora, component_scores, kept_components
from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import M, N, Worst
from fedraclora.rng import generator, torch_normal

LAYERS, RANK, TARGET, BEGIN, END, EVERY, STEPS = ("first", "second"), 4, 2, 2, 7, 2, 9
BETAS = 0.8, 0.7
FILES = ("loralib/loralib/layers.py", "loralib/loralib/adalora.py")


def their_model(module: Any) -> nn.Module:
    """Build layers of the code whose factors are drawn."""
    rng, model = generator(0, "adalora"), nn.Module()
    for name in LAYERS:
        layer = module.SVDLinear(N, M, r=RANK)
        layer.lora_A.data = torch_normal(rng, RANK, N)
        layer.lora_B.data = torch_normal(rng, M, RANK)
        model.add_module(name, layer)
    return model


def slopes(model: nn.Module, step: int) -> None:
    """Draw the gradients of a step; singular values are one again, and have none."""
    rng = generator(step, "slopes")
    for name, value in model.named_parameters():
        if "lora_E" in name:
            value.data.fill_(1.0)
        drawn = torch_normal(rng, *value.shape).to(value)
        value.grad = torch.zeros_like(value) if "lora_E" in name else drawn


def compare(code: Repository) -> Findings:
    """Compare importance, uncertainty, the budget and the components that are kept."""
    worst, smoothed = Worst(), dict[str, tuple[torch.Tensor, torch.Tensor]]()
    rule = AdaLora(TARGET, BEGIN, END, EVERY, *BETAS)
    with code.modules(*FILES, root="loralib") as [_, module]:
        model = their_model(module)
        options = {"init_warmup": BEGIN, "final_warmup": STEPS - END, "mask_interval": EVERY}
        theirs = module.RankAllocator(
            model, RANK, TARGET, beta1=BETAS[0], beta2=BETAS[1], total_step=STEPS, **options
        )
        for step in range(1, END):
            slopes(model, step)
            for name, value in model.named_parameters():
                if value.grad is not None and name.endswith(("lora_A", "lora_B")):
                    old = smoothed.get(name)
                    smoothed[name] = rule.smoothed(old, value.detach(), value.grad)
            budget, threshold = theirs.update_and_mask(model, step)
            for name, (importance, uncertainty) in smoothed.items():
                worst.add(importance=(importance, theirs.exp_avg_ipt[name]))
                worst.add(uncertainty=(uncertainty, theirs.exp_avg_unc[name]))
            cut = rule.budget(step, len(LAYERS) * RANK, len(LAYERS))
            worst.add(cuts=(torch.tensor(1 + (cut is None)), torch.tensor(1 + (threshold is None))))
            if cut is not None:
                worst.add(budget=(torch.tensor(cut), torch.tensor(budget)))
                worst.add(kept=(kept(smoothed, cut), 1 + (alive(model) != 0).double()))
    return worst.found


def kept(smoothed: Mapping[str, tuple[torch.Tensor, torch.Tensor]], budget: int) -> torch.Tensor:
    """Choose components as ours does: 2 for one that is kept, 1 for another."""
    scores = {}
    for layer in LAYERS:
        B, A = (torch.mul(*smoothed[f"{layer}.lora_{label}"]) for label in ("B", "A"))
        scores[layer] = component_scores(B, A)
    found = torch.ones(len(LAYERS), RANK, dtype=torch.float64)
    for row, layer in zip(found, LAYERS, strict=True):
        row[kept_components(scores, budget)[layer]] = 2
    return found


def alive(model: nn.Module) -> torch.Tensor:
    """Return the singular values of the code's layers."""
    return torch.stack([model.get_parameter(f"{n}.lora_E").detach().flatten() for n in LAYERS])


CHECK = CodeCheck(
    "allocation=adalora",
    "QingruZhang/AdaLoRA",
    "d10f5eb",
    f"importance, budget and cuts of two layers, {END - 1} steps",
    compare,
)
