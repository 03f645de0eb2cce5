"""FFA-LoRA: the flag ``freeze_A`` of FedSA-LoRA's code, and its mean of B.

The authors of FFA-LoRA have no public code. The flag freezes A in PEFT's LoRA, whose A is drawn by
each client; ours draws one for all, with orthonormal rows.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.fedsa_lora import compare_mean
from fedraclora.experiments.authors.toy import ALPHA, ROUNDS, M, N, R, adapted
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora

BUILDER = "federatedscope/glue/model/model_builder.py"
UNUSED = ("federatedscope.glue.model.adapter_builder",)
OPTIONS = SimpleNamespace(
    model=SimpleNamespace(type="toy@huggingface_llm"),
    llm=SimpleNamespace(adapter=SimpleNamespace(args=[{}], use=True)),
    federate=SimpleNamespace(freeze_A=True, method="ffa-lora"),
)


def trained_by(code: Repository) -> set[str]:
    """Return the labels of the factors that clients of the code train under the flag."""
    with (
        code.modules(BUILDER, root="federatedscope/glue/model", unused=UNUSED) as [module],
        patch.object(module, "get_model_from_huggingface", lambda **_: nn.Linear(N, M)),
        patch.object(module, "AdapterModel", lambda layer, **_: adapted(layer)),
    ):
        model = module.get_llm(OPTIONS)
    return {n.split("lora_")[1][0] for n, p in model.named_parameters() if p.requires_grad}


def compare(code: Repository) -> Findings:
    """Compare what is trained, and the factor that is averaged after each round."""
    method = FedRacLora(R, ALPHA, merge_every=None)
    same = torch.tensor(trained_by(code) == {method.train})
    return {**compare_mean(code, method, "B"), "what is trained": float(~same)}


CHECK = CodeCheck(
    "ffa_lora",
    "Pengxin-Guo/FedSA-LoRA",
    "fc276b5",
    f"what is trained, and the server's step, {ROUNDS} rounds",
    compare,
)
