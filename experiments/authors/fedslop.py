"""FedSLoP: whole rounds of ``run_round_fedslop_torch``, training included, on their network.

Their sketches come from `torch.randn` and a QR: it is given ours, whose rows are orthonormal
already, so that both project on the same subspace. Clients train on all their samples at once.
Momentum begins anew in each round: their clients keep it, in full shape, so that later steps leave
the subspace of the round, and an update has more numbers than are counted for it.
"""

from __future__ import annotations

import copy
from unittest.mock import patch

import torch

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import (
    ROUNDS,
    ToySamples,
    Worst,
    drawn_network,
    drawn_sketches,
    trained,
)
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora

CLIENTS, SAMPLES, RANK, SEED = 3, 6, 5, 11
STEPS, LR, MOMENTUM = 4, 0.02, 0.8
UNUSED = ("algorithm", "torchvision")


def samples() -> list[ToySamples]:
    """Draw those of each client: pictures [N, 784] and classes [N]."""
    rng = generator(0, "pictures")
    inputs = torch_normal(rng, CLIENTS, SAMPLES, 784).float()
    targets = torch.from_numpy(rng.integers(10, size=(CLIENTS, SAMPLES)))
    return [*zip(inputs, targets, strict=True)]


def compare(code: Repository) -> Findings:
    """Compare all weights after each round."""
    worst, method = Worst(), FedRacLora(rank=RANK, sketch="orthonormal")
    path = "code/experiment_mnist_federated_torch.py"
    words = ["method=fedslop", f"method.rank={RANK}", f"seed={SEED}", "head=lora", "bias=full"]
    words += [f"local.steps={STEPS}", f"local.lr={LR}", f"local.momentum={MOMENTUM}"]
    setting = {"lr": LR, "local_epochs": STEPS, "momentum": MOMENTUM, "proj_rank": RANK}
    with code.modules(path, root="code", unused=UNUSED) as [module]:
        theirs = drawn_network(module.SimpleMLP())
        start = copy.deepcopy(theirs)
        for round_, drawn in enumerate(drawn_sketches(start, method, SEED, "full", head="fc2"), 1):
            given = iter(drawn)
            with patch.object(module.torch, "randn", lambda *_, given=given, **__: next(given)):
                theirs, _ = module.run_round_fedslop_torch(
                    theirs,
                    [[pair] for pair in samples()],
                    torch.device("cpu"),
                    {},
                    {**setting, "client_fraction": 1.0, "round": round_},
                )
            ours = trained(start, samples(), round_, *words).state_dict()
            worst.add(**{n: (ours[n], value) for n, value in theirs.state_dict().items()})
    return worst.found


CHECK = CodeCheck(
    "fedslop",
    "pkumelon/FedSLoP",
    "b7af998",
    f"whole rounds with training, {ROUNDS} rounds",
    compare,
)
