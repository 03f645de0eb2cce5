"""FedEx-LoRA: the server's step of ``fed_agg.aggregate_models_ours``, on a layer of PEFT.

The layer is GPT-2's ``Conv1D``, which keeps W transposed: the code transposes the residual for
every layer, which is wrong for `torch.nn.Linear`. A plain mean, as clients have equal weights.
"""

from __future__ import annotations

from types import SimpleNamespace

from transformers.pytorch_utils import Conv1D

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import (
    ALPHA,
    PLACE,
    ROUNDS,
    M,
    N,
    R,
    Server,
    Worst,
    adapted,
    weight,
)
from fedraclora.strategies.methods.fedex_lora import FedExLora

UNUSED = ("transformers", "datasets", "tqdm", "data_utils", "models", "sklearn.metrics")


def compare(code: Repository) -> Findings:
    """Compare W and both factors after each round."""
    ours = Server(FedExLora(R, ALPHA))
    theirs = adapted(Conv1D(M, N))
    theirs.load_state_dict({PLACE + "base_layer.weight": weight().mT}, strict=False)
    worst = Worst()
    with code.modules("fed_agg.py", unused=UNUSED) as [module]:
        for _ in range(ROUNDS):
            replies = ours.replies()
            named = [
                {f"{PLACE}lora_{label}.default.weight": x.float() for label, x in reply.items()}
                for reply in replies
            ]
            args = SimpleNamespace(lora_alpha=ALPHA, lora_r=R, rslora=False)
            theirs = module.aggregate_models_ours(theirs, named, args)
            ours.close(replies)
            worst.add_factors(ours, theirs)
            base = theirs.state_dict()[PLACE + "base_layer.weight"]
            worst.add(W=(ours.state.base["w"], base.mT))
    return worst.found


CHECK = CodeCheck(
    "fedex_lora",
    "CERT-Lab/fedex-lora",
    "2fa2e4a",
    f"the server's step, {ROUNDS} rounds",
    compare,
)
