"""FLoRA: the server's step of ``model_aggregation.FedAvg`` with ``stacking``; files of clients."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import (
    ALPHA,
    ROUNDS,
    SCALE,
    SIZES,
    R,
    Server,
    Worst,
    save_replies,
)
from fedraclora.strategies.methods.flora_stacking import FloraStacking


def compare(code: Repository) -> Findings:
    """Compare what each round merges, over the scale: the product of the stacked factors."""
    ours, worst = Server(FloraStacking(R, ALPHA), SIZES), Worst()
    clients = range(len(SIZES))
    with (
        code.modules("fed_utils/model_aggregation.py", root="fed_utils") as [module],
        tempfile.TemporaryDirectory() as folder,
    ):
        for epoch in range(ROUNDS):
            before, replies = ours.state.base["w"], ours.replies()
            places = [Path(folder, str(epoch), f"local_output_{k}") for k in clients]
            save_replies(replies, places, "{}")
            sizes, ranks = dict(enumerate(SIZES)), [R] * len(SIZES)
            flags = {"heter": False, "zero_padding": False, "full": False}
            module.FedAvg(None, clients, folder, sizes, epoch, True, R, local_ranks=ranks, **flags)
            stacked = torch.load(Path(folder, str(epoch), "adapter_model.bin"))
            ours.close(replies)
            moved = (ours.state.base["w"] - before) / SCALE
            worst.add(merge=(moved, stacked["B"].double() @ stacked["A"].double()))
    return worst.found


CHECK = CodeCheck(
    "flora_stacking",
    "ATP-1010/FederatedLLM",
    "7bea158",
    f"the server's step, {ROUNDS} rounds",
    compare,
)
