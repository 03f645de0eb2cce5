"""FedAvg-LoRA (FedIT): the server's step of Shepherd's ``model_aggregation.FedAvg``, with PEFT."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import (
    ALPHA,
    PLACE,
    ROUNDS,
    SIZES,
    M,
    N,
    R,
    Server,
    Worst,
    adapted,
    save_replies,
)
from fedraclora.strategies.methods.fedavg_lora import FedAvgLora


def compare(code: Repository) -> Findings:
    """Compare both factors after each round; clients' files are written as their trainer does."""
    ours, worst = Server(FedAvgLora(R, ALPHA), SIZES), Worst()
    theirs = adapted(torch.nn.Linear(N, M, bias=False))
    clients = range(len(SIZES))
    with (
        code.modules("fed_utils/model_aggregation.py", root="fed_utils") as [module],
        tempfile.TemporaryDirectory() as folder,
    ):
        for epoch in range(ROUNDS):
            replies = ours.replies()
            places = [Path(folder, str(epoch), f"local_output_{k}") for k in clients]
            save_replies(replies, places, PLACE + "lora_{}.weight")
            theirs = module.FedAvg(theirs, clients, folder, dict(enumerate(SIZES)), epoch)
            ours.close(replies)
            worst.add_factors(ours, theirs)
    return worst.found


CHECK = CodeCheck(
    "fedavg_lora",
    "JayZhang42/FederatedGPT-Shepherd",
    "bcffa00",
    f"the server's step, {ROUNDS} rounds",
    compare,
)
