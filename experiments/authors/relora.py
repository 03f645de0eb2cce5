"""ReLoRA: ``ReLoRaLinear.merge_and_reinit`` and ``optimizer_reset`` beside our merge and moments.

Of the code's ways to reset an optimizer, the one by magnitude is compared, on first moments: ours
keeps second moments at the same entries, theirs by their own size. What it calls a reset to zero
keeps a thousandth of the moments, drawn at random.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import ALPHA, ROUNDS, M, N, R, Server, Worst, weight
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.methods.fedavg_lora import FedAvgLora
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.moments import begin_moments

KEPT = 0.25
FILES = ("peft_pretraining/modeling_llama.py",)
LAYER, RESET = "peft_pretraining/relora.py", "peft_pretraining/training_utils.py"
UNUSED = ("bitsandbytes", "bitsandbytes.functional", "loguru", "wandb")


def merges(module: Any, worst: Worst) -> None:
    """Compare the weights after each merge of one client."""
    ours = Server(FedAvgLora(R, ALPHA, merge_every=1), [1])
    layer = module.ReLoRaLinear(
        N, M, R, lora_alpha=ALPHA, bias=False, weight_data=weight(), quantize=None
    ).double()
    for _ in range(ROUNDS):
        replies = ours.replies()
        for label, value in replies[0].items():
            getattr(layer, f"lora_{label}").weight.data = value.clone()
        layer.merge_and_reinit()
        worst.add(W=(ours.close(replies)["w"], layer.weight.detach()))
        begun = ours.state.carried.get("w/B", torch.zeros(M, R)), layer.lora_B.weight.detach()
        worst.add(B=(1 + begun[0], 1 + begun[1]))


def moments(module: Any, worst: Worst) -> None:
    """Compare the first moments that outlive a merge."""
    rng = generator(0, "moments")
    first, second = torch_normal(rng, R, N).float(), torch_normal(rng, R, N).float().square()
    local = LocalConfig(
        optimizer="adamw", lr=0.1, optimizer_state="merge", optimizer_state_kept=KEPT
    )
    stored = {"moments/first/w/A": first[None], "moments/second/w/A": second[None]}
    stored |= {"moments/steps": torch.ones(1), "moments/link": torch.ones(1)}
    ours = begin_moments(stored, local, link=2)["moments/first/w/A"][0]
    parameter = nn.Parameter(torch.zeros(R, N))
    held = {"exp_avg": first.clone(), "exp_avg_sq": second.clone()}
    module.optimizer_reset(
        SimpleNamespace(state={parameter: held}),
        reset_params=[parameter],
        optimizer_state_keys=[*held],
        reset_optimizer_on_relora=False,
        optimizer_random_pruning=0.0,
        optimizer_magnitude_pruning=1 - KEPT,
    )
    worst.add(**{"first moment": (ours, held["exp_avg"])})


def compare(code: Repository) -> Findings:
    """Compare merges, and what is kept of moments."""
    worst = Worst()
    with code.modules(LAYER, root="peft_pretraining", unused=UNUSED) as [layer]:
        merges(layer, worst)
    unused = (*UNUSED, "peft_pretraining.modeling_llama")
    with code.modules(RESET, root="peft_pretraining", unused=unused) as [reset]:
        moments(reset, worst)
    return worst.found


CHECK = CodeCheck(
    "fed_relora",
    "Guitaricet/relora",
    "2881b5f",
    f"{ROUNDS} merges, and the moments that are kept",
    compare,
)
