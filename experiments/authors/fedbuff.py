"""FedBuff: FLSim's aggregator and weights of clients, beside our server without waiting.

In each round all clients start; some replies come at once, the others one or two rounds later.
FLSim adds up updates, each times its samples and (1 + staleness)^(-1/2), and multiplies the sum by
a learning rate: with the learning rate 1 / (samples of the buffer) that is our mean. Its settings
choose the exponent: without any a stale update counts in full.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from fedraclora.devices.asynchronous import PendingClient
from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import DRAW, SIZES, M, N, Worst, weight
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.method import Cohort, Plan, RoundInstructions, State
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.buffered import ReplyBatch, merge
from fedraclora.strategies.methods.fedavg import FedAvg

STEPS, LATE = 5, (0, 2, 1, 0)  # server steps; rounds until each client's reply comes
FILES = (
    "utils/config_utils",
    "common/logger",
    "interfaces/batch_metrics",
    "interfaces/model",
    "utils/fl/stats",
    "utils/fl/personalized_model",
    "utils/fl/common",
    "utils/distributed/fl_distributed",
    "channels/communication_stats",
    "channels/message",
    "channels/base_channel",
    "reducers/base_round_reducer",
    "optimizers/async_aggregators",
    "utils/async_trainer/async_example_weights",
    "utils/async_trainer/async_staleness_weights",
    "utils/async_trainer/async_weights",
)
UNUSED = (
    "flsim.privacy.common",
    "flsim.reducers.dp_round_reducer",
    "flsim.reducers.weighted_dp_round_reducer",
)


def changes(round_: int) -> torch.Tensor:
    """Draw what training changes at each client that starts in a round, [clients, m, n]."""
    return torch_normal(generator(round_, "changes"), len(SIZES), M, N)


def landed(step: int) -> list[tuple[int, int]]:
    """List the replies of a server step: the round and the client of each, in order."""
    found = [(step - late, client) for client, late in enumerate(LATE)]
    return sorted((round_, client) for round_, client in found if round_ > 0)


class Ours:
    """Our server, whose clients train all weights."""

    def __init__(self) -> None:
        self.method = FedAvg()
        plan = Plan({"w": LayerView("linear", (M, N))}, shapes={"w": (M, N)}, weights=("w",))
        self.state: State = self.method.initial_state({"w": weight()}, plan, DRAW)
        self.sent: dict[int, RoundInstructions] = {}

    def step(self, step: int) -> torch.Tensor:
        """Merge the replies of a step; return the weights."""
        sizes = torch.tensor(SIZES, dtype=torch.float64)
        cohort = Cohort(torch.arange(len(SIZES)), sizes)
        self.sent[step] = self.method.open_round(self.state, step, cohort, DRAW)
        replies, batches = landed(step), []
        for round_ in sorted({each for each, _ in replies}):
            clients = [client for each, client in replies if each == round_]
            flights = tuple(PendingClient(float(step), client, round_) for client in clients)
            rows = changes(round_)[clients].flatten(1)
            batches.append(ReplyBatch(round_, self.sent[round_], flights, rows, sizes[clients]))
        self.state = merge(self.method, self.state, batches, self.sent[step], step)
        return self.method.weights(self.state, DRAW)["w"]


def wrapped(interface: Any, values: torch.Tensor) -> Any:
    """Wrap weights as a model of FLSim."""
    layer = nn.Linear(N, M, bias=False).double()
    layer.weight.data = values.clone()
    methods = {name: lambda *_, **__: None for name in interface.__abstractmethods__}
    return type("Toy", (interface,), methods | {"fl_get_module": lambda _: layer})()


def compare(code: Repository) -> Findings:
    """Compare the weights after each server step."""
    ours, worst = Ours(), Worst()
    # Defaults of its dataclasses are objects, which Python 3.11 refuses unless they have a hash.
    hashed = partial(dataclasses.dataclass, unsafe_hash=True)
    with (
        patch.object(dataclasses, "dataclass", hashed),
        code.modules(*[f"flsim/{name}.py" for name in FILES], unused=UNUSED) as modules,
    ):
        found = dict(zip(FILES, modules, strict=True))
        interface = found["interfaces/model"].IFLModel
        given = found["utils/async_trainer/async_weights"].AsyncWeight(
            staleness_weight=found[
                "utils/async_trainer/async_staleness_weights"
            ].PolynomialStalenessWeightConfig(exponent=0.5, avg_staleness=0),
            example_weight=found[
                "utils/async_trainer/async_example_weights"
            ].LinearExampleWeightConfig(avg_num_examples=1),
        )
        theirs = found["optimizers/async_aggregators"].FedAvgWithLRFedBuffAggregator(
            global_model=wrapped(interface, weight()), lr=1.0, buffer_size=1
        )
        for step in range(1, STEPS + 1):
            replies = landed(step)
            theirs.cfg.buffer_size = len(replies)
            theirs.orig_lr = 1 / sum(SIZES[client] for _, client in replies)
            for round_, client in replies:
                theirs.zero_grad()
                late = theirs.model_staleness(model_seqnum=round_ - 1)
                update = wrapped(interface, -changes(round_)[client])
                theirs.on_client_training_end(update, update, given.weight(SIZES[client], late))
            after = theirs.global_model.fl_get_module().weight.detach()
            worst.add(W=(ours.step(step), after))
    return worst.found


CHECK = CodeCheck(
    "system.buffer",
    "facebookresearch/FLSim",
    "504f39e",
    f"{STEPS} server steps, replies up to two rounds late",
    compare,
)
