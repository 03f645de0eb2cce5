"""FedSA-LoRA: ``ClientsAvgAggregator`` on what clients share, with weights by their samples.

Their configuration keeps the factor B, and the classifier, at each client; ours leaves the head to
the settings of the run.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import ALPHA, ROUNDS, SIZES, R, Server, Worst
from fedraclora.protocol.method import Method
from fedraclora.strategies.methods.fedsa_lora import FedSaLora

PATH = "federatedscope/core/aggregators/clients_avg_aggregator.py"
UNUSED = ("federatedscope.core.aggregators", "federatedscope.core.auxiliaries.utils")
OPTIONS = SimpleNamespace(federate=SimpleNamespace(ignore_weight=False, use_ss=False))


def compare_mean(code: Repository, method: Method, label: str) -> Findings:
    """Compare the factor that is averaged, after each round."""
    ours, worst = Server(method, SIZES), Worst()
    with code.modules(PATH, root="federatedscope/core/aggregators", unused=UNUSED) as [module]:
        theirs = module.ClientsAvgAggregator(config=OPTIONS)
        for _ in range(ROUNDS):
            replies = ours.replies()
            sent = [(n, {label: r[label]}) for n, r in zip(SIZES, replies, strict=True)]
            with patch.object(module, "param2tensor", lambda value: value):
                mean = theirs.aggregate({"client_feedback": sent})
            ours.close(replies)
            worst.add(**{label: (ours.state.carried[f"w/{label}"], mean[label])})
    return worst.found


CHECK = CodeCheck(
    "fedsa_lora",
    "Pengxin-Guo/FedSA-LoRA",
    "fc276b5",
    f"the server's step, {ROUNDS} rounds",
    lambda code: compare_mean(code, FedSaLora(R, ALPHA), "A"),
)
