"""Fed-SB: the server's step of ``fed_agg.aggregate_models_fed_sb``: a mean of cores."""

from __future__ import annotations

import torch

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import ALPHA, ROUNDS, R, Server, Worst
from fedraclora.strategies.methods.fed_sb import FedSb

UNUSED = ("transformers", "datasets", "tqdm", "peft", "fed_sb.models", "sklearn.metrics")


def compare(code: Repository) -> Findings:
    """Compare the core after each round."""
    ours, worst = Server(FedSb(R, ALPHA)), Worst()
    theirs = torch.nn.Module()
    theirs.default_lora_latent_mapping = torch.nn.Linear(R, R, bias=False)
    with code.modules("fed_sb/fed/fed_agg.py", root="fed_sb/fed", unused=UNUSED) as [module]:
        for _ in range(ROUNDS):
            replies = ours.replies()
            named = [{NAME: reply["R"].float()} for reply in replies]
            theirs = module.aggregate_models_fed_sb(theirs, named)
            ours.close(replies)
            worst.add(R=(ours.state.carried["w/R"], theirs.state_dict()[NAME]))
    return worst.found


NAME = "default_lora_latent_mapping.weight"
CHECK = CodeCheck(
    "fed_sb",
    "putssander/fed-sb",
    "1d437e4",
    f"the server's step, {ROUNDS} rounds",
    compare,
)
