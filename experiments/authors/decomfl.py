"""DeComFL: whole rounds of ``CeZO_Server``, with ``ResetClient`` and catch-up, on a small network.

Their directions come from generators with seeds; they are given ours. Clients look along them on
all their samples at once. Differences of losses are rounded, so that eps is large here.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import ROUNDS, Worst, network, samples, trained
from fedraclora.protocol.method import Draw
from fedraclora.protocol.plan import make_plan
from fedraclora.strategies.methods.decomfl import DeComFl

SEED = 11
STEPS, DIRECTIONS, EPS, LR = 2, 3, 0.05, 0.02
ESTIMATORS = "cezo_fl/gradient_estimators/"
FILES = (
    "cezo_fl/typing.py",
    "cezo_fl/util/metrics.py",
    f"{ESTIMATORS}abstract_gradient_estimator.py",
    f"{ESTIMATORS}random_gradient_estimator.py",
    f"{ESTIMATORS}random_gradient_estimator_splitted.py",
    f"{ESTIMATORS}adam_forward.py",
    "cezo_fl/client.py",
    "cezo_fl/run_client_jobs.py",
    "cezo_fl/server.py",
)


def directions(model: nn.Module, seed: int, number: int) -> torch.Tensor:
    """Draw ours for a look, as one vector over all weights.

    Args:
        model: That has the weights.
        seed: The number of the local step, over all rounds.
        number: Of the direction in that step.
    """
    plan = make_plan(model, ("2",), head_policy="lora", bias_policy="frozen")
    walk = DeComFl(STEPS, DIRECTIONS, EPS).walk(plan, 1 + seed // STEPS, Draw(SEED))
    at = seed % STEPS * DIRECTIONS + number
    weights = dict(model.named_parameters())
    return torch.cat([walk.direction(n, w, at).reshape(-1).float() for n, w in weights.items()])


def parts(estimators: ModuleType) -> dict[str, Any]:
    """Build what a replica of the code has: its network, optimizer and estimator, and the loss."""
    model = network()
    estimator = estimators.RandomGradientEstimatorBatch(
        model.parameters(), mu=EPS, num_pert=DIRECTIONS
    )
    estimator.get_rng = lambda seed, number: (seed, number)
    estimator.generate_perturbation_norm = lambda pair: directions(model, *pair)
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=LR),
        "estimator": estimator,
        "model_inference": lambda model, inputs: model(inputs),
        "criterion": nn.functional.cross_entropy,
        "accuracy_func": lambda *_: torch.zeros(()),
    }


def their_server(client: ModuleType, estimators: ModuleType, server: ModuleType) -> Any:
    """Build the server and the clients of the code, each with a copy of the network."""
    cpu, clients = torch.device("cpu"), []
    for pair in samples():
        own = parts(estimators)
        estimator = own.pop("estimator")
        made = client.ResetClient(dataloader=[pair], device=cpu, grad_estimator=estimator, **own)
        clients.append(made)
    found = server.CeZO_Server(clients, cpu, len(clients), STEPS)
    own = parts(estimators)
    found.set_server_model_and_criterion(gradient_estimator=own.pop("estimator"), **own)
    return found


def compare(code: Repository) -> Findings:
    """Compare all weights after each round."""
    worst = Worst()
    words = ["method=decomfl", f"method.steps={STEPS}", f"method.directions={DIRECTIONS}"]
    words += [f"method.eps={EPS}", f"local.steps={STEPS}", f"local.lr={LR}", f"seed={SEED}"]
    words += ["head=lora", "bias=frozen"]
    with code.modules(*FILES) as [*_, estimators, _, client, _, server]:
        theirs, steps = their_server(client, estimators, server), iter(range(ROUNDS * STEPS))
        draws = SimpleNamespace(
            sample=lambda known, count: [*known][:count], randint=lambda *_: next(steps)
        )
        with patch.object(server, "random", draws):
            for round_ in range(ROUNDS):  # as they count
                theirs.train_one_step(round_)
                ours = trained(network(), samples(), 1 + round_, *words).state_dict()
                state = theirs.server_model.state_dict()
                worst.add(**{n: (ours[n], value) for n, value in state.items()})
    return worst.found


CHECK = CodeCheck(
    "decomfl",
    "ZidongLiu/DeComFL",
    "0c426e6",
    f"whole rounds with training and catch-up, {ROUNDS} rounds",
    compare,
)
