"""FlexLoRA: ``model_aggregation.FlexLoRA`` and ``adaptive_peft.distribute_weight_fast``.

The code has the scale 16 / r_k in its first function, so that alpha is 16 here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import ROUNDS, SIZES, R, Server, Worst, save_replies
from fedraclora.strategies.methods.flexlora import FlexLora

CODED_ALPHA = 16.0


def compare(code: Repository) -> Findings:
    """Compare the product that each round starts from: the roots of S are placed otherwise."""
    ours, worst = Server(FlexLora(R, CODED_ALPHA), SIZES), Worst()
    ranks = {"alpha": CODED_ALPHA, "Client": {"w": R}}
    paths = ("fed_utils/model_aggregation.py", "fed_utils/adaptive_peft.py")
    with (
        code.modules(*paths, root="fed_utils") as [aggregation, adaptive],
        tempfile.TemporaryDirectory() as folder,
    ):
        for epoch in range(ROUNDS):
            replies = ours.replies()
            clients, sizes = range(len(SIZES)), dict(enumerate(SIZES))
            places = [Path(folder, str(k), f"local_output_epoch_{epoch}") for k in clients]
            save_replies(replies, places, "w.lora_{}.local.weight")
            mean = aggregation.FlexLoRA(clients, folder, sizes, epoch)
            sent = adaptive.distribute_weight_fast(mean, ranks)
            ours.close(replies)
            B, A = (sent[f"w.lora_{label}.local.weight.{R}"] for label in ("B", "A"))
            carried = ours.state.carried
            worst.add(product=(carried["w/B"].double() @ carried["w/A"].double(), B @ A))
    return worst.found


CHECK = CodeCheck(
    "flexlora",
    "alibaba/FederatedScope",
    "1cb1ab76",
    f"the server's step, {ROUNDS} rounds",
    compare,
)
