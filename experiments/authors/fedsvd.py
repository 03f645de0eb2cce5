"""FedSVD: ``server.aggregate`` of ``model=ffa`` and ``utils.reinit_lora``, on a layer of PEFT."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

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
)
from fedraclora.strategies.methods.fedsvd import FedSvd

A, B = PLACE + "lora_A.default.weight", PLACE + "lora_B.default.weight"
UNUSED = ("wandb", "datasets", "evaluate", "transformers", "modules.federated")


def compare(code: Repository) -> Findings:
    """Compare both factors after each round, singular vectors up to their common sign."""
    ours, worst = Server(FedSvd(R, ALPHA), SIZES), Worst()
    theirs = adapted(torch.nn.Linear(N, M, bias=False))
    paths = ("misc/forked_pdb.py", "misc/utils.py", "fedmm/fedavg/server.py")
    with code.modules(*paths, unused=UNUSED) as [_, utils, server]:
        for _ in range(ROUNDS):
            replies = ours.replies()
            start = ours.start
            theirs.load_state_dict({A: start["A"], B: start["B"]}, strict=False)
            changes = {
                k: {A: 0 * start["A"].numpy(), B: (reply["B"] - start["B"]).numpy()}
                for k, reply in enumerate(replies)
            }
            held = {k: v.numpy() for k, v in theirs.state_dict().items()}
            side = SimpleNamespace(
                args=MagicMock(agg_flora=False, agg_fedex=False, agg_flora_svd=False, model="ffa"),
                model=SimpleNamespace(named_parameters=lambda: [(A, None), (B, None)]),
                get_weights=lambda held=held: {"model": held},
                logger=MagicMock(),
            )
            shares = [size / sum(SIZES) for size in SIZES]
            mean = server.Server.aggregate(side, changes, shares)
            named = {B: torch.as_tensor(mean[B])}
            theirs.load_state_dict(named, strict=False)
            utils.reinit_lora(theirs)
            ours.close(replies)
            state, carried = theirs.state_dict(), ours.state.carried
            signs = (carried["w/A"].double() * state[A]).sum(1).sign()
            worst.add(
                A=(carried["w/A"], state[A] * signs[:, None]),
                B=(carried["w/B"], state[B] * signs),
            )
    return worst.found


CHECK = CodeCheck(
    "fedsvd",
    "sw-programmer/FedSVD",
    "480898d",
    f"the server's step, {ROUNDS} rounds",
    compare,
)
