"""FedRot-LoRA: ``rotation_alignment_soft`` of each client's factors, and their mean."""

from __future__ import annotations

import torch

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import ALPHA, ROUNDS, R, Server, Worst
from fedraclora.strategies.methods.fedrot_lora import FedRotLora

UNUSED = ("federatedscope.core.auxiliaries.utils",)


def compare(code: Repository) -> Findings:
    """Compare the means of rotated factors, for a full and a half rotation, each round in turn."""
    worst = Worst()
    path = "federatedscope/rotation_alignment_tools.py"
    with code.modules(path, root="federatedscope", unused=UNUSED) as [module]:
        for strength in (1.0, 0.5):
            ours = Server(FedRotLora(R, ALPHA, strength=strength))
            for number in range(1 + ROUNDS):
                replies = ours.replies()
                start = {f"w.lora_{label}": x.float() for label, x in ours.start.items()}
                turned = []
                for reply in replies:
                    A, B = ({f"w.lora_{label}": reply[label].float()} for label in ("A", "B"))
                    if number:  # nothing is aligned in the first round
                        side = "A" if number % 2 else "B"
                        A, B = module.rotation_alignment_soft(start, side, A, B, strength)
                    turned.append({**A, **B})
                ours.close(replies)
                mean = {k: torch.stack([each[k] for each in turned]).mean(0) for k in start}
                worst.add(
                    **{
                        label: (ours.state.carried[f"w/{label}"], mean[f"w.lora_{label}"])
                        for label in ("A", "B")
                    }
                )
    return worst.found


CHECK = CodeCheck(
    "fedrot_lora",
    "haoran-zh/FedRot-LoRA",
    "36a67ef",
    f"the alignment and the mean, {1 + ROUNDS} rounds, full and half",
    compare,
)
