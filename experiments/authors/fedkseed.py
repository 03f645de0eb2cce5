"""FedKSeed: whole rounds of ``Client`` and ``Server``, with FedKSeed-Pro, on a small network.

Their directions come from generators with seeds: they are given ours, and our draws of directions.
Clients look along them on all their samples at once. Differences of losses are rounded, so that eps
is large here.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
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
from fedraclora.strategies.methods.fedkseed import FedKSeed

SEED, SEEDS, STEPS, EPS, LR = 11, 5, 4, 0.05, 0.02
FILES = (
    "optimizers/mezo_optimizer.py",
    "optimizers/mezo_bias_optimizer.py",
    "client.py",
    "server.py",
)
UNUSED = ("tqdm", "evaluations", "utils_data.default_tokens")
OPTIONS = SimpleNamespace(
    lr=LR,
    lr_decay=1.0,
    zo_eps=EPS,
    weight_decay=0.0,
    grad_clip=-1.0,
    device=0,
    batch_or_epoch="batch",
    local_step=STEPS,
    equal_weight=False,
    bias_loss_clip=1000.0,
)


class Drawings:
    """Our directions and draws, in place of theirs.

    Args:
        pro: Whether directions of longer steps are drawn more often.
    """

    def __init__(self, pro: bool) -> None:
        model = network()
        plan = make_plan(model, ("2",), head_policy="lora", bias_policy="frozen")
        self.method = FedKSeed(SEEDS, STEPS, EPS, pro)
        self.walk = self.method.walk(plan, 1, Draw(SEED))
        self.names = {w.shape: n for n, w in model.named_parameters()}
        self.left: list[int] = []

    def begin(self, round_: int, client: int, chances: np.ndarray | None) -> None:
        """Draw the directions that a client takes in a round."""
        known = torch.ones(SEEDS) if chances is None else torch.from_numpy(chances)
        program = self.method.program(self.walk, round_)
        self.left = program.visited(torch.tensor([client]), STEPS, known)[0].tolist()

    def choice(self, *_: Any, **__: Any) -> list[int]:
        """Stand in for the choice of a seed."""
        return [self.left.pop(0)]

    def normal(self, size: torch.Size, **_: Any) -> torch.Tensor:
        """Stand in for the drawing of one weight's direction, by the seed that was set."""
        like = torch.empty(size)
        return self.walk.direction(self.names[size], like, torch.initial_seed()).float()


def their_server(module: ModuleType, pro: bool) -> Any:
    """Build the server of the code without a language model."""
    found = server_of_seeds(module, OPTIONS, SEEDS)
    found.args.bias_sampling, found.model_w0 = pro, Scored(network())
    found.gradient_history = {seed: [0.0] for seed in found.candidate_seeds} if pro else None
    return found


def compare(code: Repository) -> Findings:
    """Compare all weights after each round, and the chances of FedKSeed-Pro."""
    worst = Worst()
    words = ["method=fedkseed", f"method.seeds={SEEDS}", f"method.steps={STEPS}", f"seed={SEED}"]
    words += [f"method.eps={EPS}", f"local.steps={STEPS}", f"local.lr={LR}"]
    words += ["head=lora", "bias=frozen"]
    with code.modules(*FILES, unused=UNUSED) as [_, _, client, server]:
        for pro in (False, True):
            drawings, theirs = Drawings(pro), their_server(server, pro)
            clients = clients_of_seeds(client, theirs)
            with (
                patch.object(np.random, "choice", drawings.choice),
                patch.object(torch, "normal", drawings.normal),
            ):
                for round_ in range(1, ROUNDS + 1):
                    chances = np.array(theirs.calculate_probabilities()) if pro else None
                    for each in clients:
                        drawings.begin(round_, each.idx, chances)
                        given = theirs.create_model_by_seedpool(round_)
                        options = {"gradient_history": theirs.gradient_history}
                        each.local_train_with_seed_pool(
                            given, round_, probabilities=chances, **options
                        )
                    theirs.aggregate_seed_pool(clients)
                    rebuilt = theirs.create_model_by_seedpool(round_ + 1)
                    ours = _ours(round_, [*words, f"method.pro={str(pro).lower()}"])
                    state = rebuilt.inner.state_dict()
                    prefix = "pro/" if pro else ""
                    worst.add(**{prefix + n: (ours[n], w) for n, w in state.items()})
    return worst.found


def _ours(rounds: int, words: list[str]) -> dict[str, torch.Tensor]:
    model: nn.Module = trained(network(), samples(), rounds, *words)
    return model.state_dict()


CHECK = CodeCheck(
    "fedkseed",
    "alibaba/FederatedScope",
    "d7e07487",
    f"whole rounds with training, plain and Pro, {ROUNDS} rounds",
    compare,
)
