"""LoRA-RITE: steps of ``lora_rite.LoRARite`` on both factors of a quadratic, in float64."""

from __future__ import annotations

import torch

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import SCALE, M, N, R, Worst, weight
from fedraclora.rng import generator, torch_normal
from fedraclora.training.extras.lora_rite import CohortRite
from fedraclora.training.extras.pairs import Pair
from fedraclora.training.extras.settings import LocalSettings

LR, STEPS = 0.03, 8
BETAS, EPS, DECAY = (0.8, 0.9), 1e-12, 0.1


def gradients(B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute those of a quadratic of the product, with a slope for each input."""
    G = (SCALE * B @ A - weight()) * torch.linspace(0.2, 3.0, N).double()
    return SCALE * G @ A.mT, SCALE * B.mT @ G


def compare(code: Repository) -> Findings:
    """Compare both factors after each step, without the code's clipping and skipping."""
    rng, worst = generator(0, "rite"), Worst()
    B, A = torch_normal(rng, M, R), torch_normal(rng, R, N)
    values = {"w/B": B[None].clone(), "w/A": A[None].clone()}
    local = LocalSettings(
        lr=LR, optimizer="lora_rite", beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY
    )
    ours = CohortRite(local, values, dict.fromkeys(values, LR), [Pair("w", SCALE, {})])
    with code.modules("lora_rite.py") as [module]:
        left, right = torch.nn.Parameter(B.clone()), torch.nn.Parameter(A.clone())
        theirs = module.LoRARite(
            [left, right],
            BETAS,
            eps=EPS,
            lr=LR,
            weight_decay=DECAY,
            clip_unmagnified_grad=0.0,
            update_skipping=0.0,
            apply_escape=True,
            lora_l_dim=1,
            lora_r_dim=0,
        )
        for _ in range(STEPS):
            left.grad, right.grad = gradients(left.detach(), right.detach())
            theirs.step()
            found = gradients(values["w/B"][0], values["w/A"][0])
            ours.step({"w/B": found[0][None], "w/A": found[1][None]})
            worst.add(B=(values["w/B"][0], left.detach()), A=(values["w/A"][0], right.detach()))
    return worst.found


CHECK = CodeCheck(
    "local=lora_rite",
    "gkevinyen5418/LoRA-RITE",
    "c9bb451",
    f"the optimizer, {STEPS} steps",
    compare,
)
