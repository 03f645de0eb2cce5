"""FRLoRA: ``fed_global.ours_init`` and ``global_aggregate``; the merge is written here.

A script of theirs adds s (B A - B_0 A_0) to the residual weights and begins from B_0 and A_0 again.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import ALPHA, ROUNDS, SCALE, R, Server, Worst, weight
from fedraclora.strategies.methods.frlora import FrLora


def compare(code: Repository) -> Findings:
    """Compare the first product and residual, and the weights after each round."""
    ours, worst = Server(FrLora(R, ALPHA)), Worst()
    args = SimpleNamespace(alg="ours", peft_lora_alpha=ALPHA, peft_lora_r=R)
    held = {"w.weight": weight().float()}
    model = SimpleNamespace(state_dict=lambda: held)
    with code.modules("fed_global.py") as [module]:
        first = {"w.lora_A.weight": torch.zeros(0), "w.lora_B.weight": torch.zeros(0)}
        first, _ = module.ours_init(args, first, model)
        product = first["w.lora_B.weight"] @ first["w.lora_A.weight"]
        for number in range(ROUNDS):
            replies = ours.replies()
            if not number:
                start = ours.start["B"] @ ours.start["A"]
                worst.add(start=(start, product), rest=(weight() - SCALE * start, held["w.weight"]))
            named = [{f"w.lora_{k}.weight": x.float() for k, x in r.items()} for r in replies]
            sizes = [1] * len(named)
            mean, _ = module.global_aggregate(args, dict(first), named, sizes, len(named))
            after = ours.close(replies)
            moved = mean["w.lora_B.weight"] @ mean["w.lora_A.weight"]
            held["w.weight"] = held["w.weight"] + SCALE * (moved - product)
            worst.add(W=(after["w"], held["w.weight"] + SCALE * product))
    return worst.found


CHECK = CodeCheck(
    "frlora",
    "IAMJackYan/FRLoRA",
    "c29baad",
    f"the start and the server's step, {ROUNDS} rounds",
    compare,
)
