"""RAC-LoRA: chains of ``LitMNISTLoRA``, with AdamW and merges, on a small network of its shape.

Its ``main.py`` trains both factors, which is COLA; flags of the same code train one, which is the
paper's method. Its factors are transposed, and its scale is alpha, not alpha / r. AdamW's moments
outlive its merges, as ours do with ``local.optimizer_state=run``. Its sketches are given: ours.
Its training is Lightning's; the steps are taken here, all samples at once, without dropout.
"""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from torch import nn

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import (
    ROUNDS,
    M,
    N,
    Worst,
    drawn_network,
    drawn_sketches,
    samples,
    trained,
)
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora

RANK, SCALE, LR, STEPS, SEED = 3, 1.5, 0.02, 4, 11
LAYERS = ("l1", "l2", "l3")
OPTIONS = SimpleNamespace(
    hidden_size=M,
    lora_rank=RANK,
    lora_alpha=SCALE,
    lora_train_A=False,
    lora_train_B=True,
    lora_init_method_A="gaussian",
    lora_init_method_B="zero",
    lr=LR,
)


class Base(nn.Module):
    """Stand in for the code's module of Lightning: inputs [N, 1, n, 1], four classes."""

    dims, num_classes = (1, N, 1), 4

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config


def network() -> nn.Module:
    """Draw the same network without factors."""
    sizes, model = (N, M, M, 4), nn.Sequential()
    for k, name in enumerate(LAYERS):
        model.add_module(name, nn.Linear(sizes[k], sizes[k + 1]))
        if k + 1 < len(LAYERS):
            model.add_module(f"relu{k}", nn.ReLU())
    return drawn_network(model)


def compare(code: Repository) -> Findings:
    """Compare all weights after each merge."""
    worst, start, pair = Worst(), network(), samples(1)[0]
    method = FedRacLora(rank=RANK, sketch="gaussian", normalize="none", alpha=SCALE * RANK)
    words = ["method=rac_lora", f"method.rank={RANK}", f"method.alpha={SCALE * RANK}"]
    words += ["method.sketch=gaussian", "method.normalize=none", f"seed={SEED}"]
    words += ["local=adamw", "local.optimizer_state=run", f"local.lr={LR}", f"local.steps={STEPS}"]
    words += ["head=lora", "bias=frozen"]
    stub: Any = ModuleType("models.base_mnist")
    stub.BaseMNIST = Base
    drawn = [*drawn_sketches(start, method, SEED, "frozen", head="l3")]
    waiting = iter([sketch for each in drawn for sketch in each])
    with (
        patch.dict(sys.modules, {"models": ModuleType("models"), "models.base_mnist": stub}),
        patch("torch.nn.init.normal_", lambda p, **_: p.data.copy_(next(waiting, p.data))),
        code.modules("rac_lora_mnist/models/lit_mnist_lora.py", root="rac_lora_mnist/models") as [
            module
        ],
    ):
        theirs = module.LitMNISTLoRA(OPTIONS).eval()
        theirs.load_state_dict(copy.deepcopy(start.state_dict()), strict=False)
        optimizer = theirs.configure_optimizers()["optimizer"]
        for round_ in range(1, ROUNDS + 1):
            for _ in range(STEPS):
                optimizer.zero_grad()
                nn.functional.nll_loss(theirs(pair[0]), pair[1]).backward()
                optimizer.step()
            theirs.merge_lora_weights()
            theirs.reset_lora_parameters()
            ours = trained(start, [pair], round_, *words).state_dict()
            state = theirs.state_dict()
            worst.add(**{n: (ours[n], state[n]) for n in start.state_dict()})
    return worst.found


CHECK = CodeCheck(
    "rac_lora",
    "hammoudhasan/RACLora",
    "7354fd2",
    f"chains with AdamW, {ROUNDS} merges",
    compare,
)
