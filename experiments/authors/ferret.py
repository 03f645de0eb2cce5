"""Ferret: whole rounds of ``Client`` and ``Server`` on a small network, whose layers are blocks.

Their directions come from a truncated normal distribution with a third of the variance, so that an
update is recovered to a third: they are given ours. They choose directions anew for each client, as
many as the norm of a block's update says: with two in all, each block has both.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import (
    ROUNDS,
    Scored,
    Worst,
    clients_of_seeds,
    network,
    samples,
    server_of_seeds,
    trained,
)
from fedraclora.protocol.method import Draw
from fedraclora.protocol.plan import make_plan
from fedraclora.strategies.methods.ferret import Ferret, blocks

SEED, DIRECTIONS, STEPS, LR, SERVER_LR = 11, 2, 4, 0.05, 0.6
FILES = ("optimizers/ferret_optimizer.py", "client.py", "server.py")
UNUSED = ("tqdm", "evaluations", "utils_data.default_tokens")
OPTIONS = SimpleNamespace(
    K=DIRECTIONS,
    lr=LR,
    slr=SERVER_LR,
    weight_decay=0.0,
    momentum=0.0,
    grad_clip=-1.0,
    n_accum=1,
    device=0,
    batch_or_epoch="batch",
    local_step=STEPS,
    equal_weight=False,
)


def blocks_of(code: ModuleType, sizes: tuple[int, ...]) -> torch.Tensor:
    """Let the code cut weights of these sizes into blocks; return the block of each, from 1."""
    model = nn.ParameterList([torch.empty(size) for size in sizes])
    framework = code.FerretFramework(model, OPTIONS, LR, [])
    return numbered([len(group) for group in framework.param_groups])


def our_blocks(sizes: tuple[int, ...]) -> torch.Tensor:
    """Cut weights of these sizes into blocks as ours does."""
    shapes = {str(k): (size,) for k, size in enumerate(sizes)}
    return numbered([len(names) for names, _ in blocks(shapes, DIRECTIONS)])


def numbered(lengths: list[int]) -> torch.Tensor:
    """Number the weights of blocks by their block."""
    return torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))


def drawn(round_: int) -> Any:
    """Give what stands in for the code's drawing of one block, by the seed that was set."""
    model = network()
    plan = make_plan(model, ("2",), head_policy="lora", bias_policy="frozen")
    walk = Ferret(DIRECTIONS).walk(plan, round_, Draw(SEED))
    names = {w.numel(): (n, w) for n, w in model.named_parameters()}

    def fill(base: torch.Tensor, **_: Any) -> torch.Tensor:
        name, like = names[base.numel()]
        z = walk.direction(name, like, torch.initial_seed()).reshape(-1)
        return base.copy_(z / base.numel() ** 0.5)

    return fill


def their_server(module: ModuleType) -> Any:
    """Build the server of the code without a language model."""
    found = server_of_seeds(module, OPTIONS, DIRECTIONS)
    found.model = Scored(network())
    return found


def compare(code: Repository) -> Findings:
    """Compare all weights after each round, and how weights are cut into blocks."""
    worst = Worst()
    words = ["method=ferret", f"method.directions={DIRECTIONS}", f"seed={SEED}"]
    words += [f"method.server_lr={SERVER_LR}", f"local.steps={STEPS}", f"local.lr={LR}"]
    words += ["head=lora", "bias=frozen"]
    with code.modules(*FILES, unused=UNUSED) as [optimizer, client, server]:
        for sizes in ((4, 100, 100), (10, 10, 10, 40, 5, 5, 30), (8, 88, 4, 32)):
            worst.add(blocks=(our_blocks(sizes), blocks_of(optimizer, sizes)))
        held = their_server(server)
        clients = clients_of_seeds(client, held)
        for round_ in range(1, ROUNDS + 1):
            with patch("torch.nn.init.trunc_normal_", drawn(round_)):
                start = held.model.state_dict()
                for each in clients:
                    model = Scored(network())
                    model.load_state_dict(start)
                    each.local_train_with_seed_pool(model, round_)
                held.aggregate_seed_pool(clients)
                held.update_global_model_by_seed_pool()
            ours_after = trained(network(), samples(), round_, *words).state_dict()
            after = held.model.inner.state_dict()
            worst.add(**{n: (ours_after[n], value) for n, value in after.items()})
    return worst.found


CHECK = CodeCheck(
    "ferret",
    "allen4747/Ferret",
    "1a412a9",
    f"whole rounds with training, and the blocks, {ROUNDS} rounds",
    compare,
)
