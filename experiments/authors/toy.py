"""The toy problem of a server's step: one matrix, four clients, replies that are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import torch
from torch import nn
from typing_extensions import override

import fedraclora
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.method import Cohort, Draw, Method, Plan
from fedraclora.protocol.plan import make_plan
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator, torch_normal
from fedraclora.tree import Tree, weights_of

M, N, R, ALPHA, CLIENTS, ROUNDS = 8, 11, 3, 5.0, 4, 3
SCALE = ALPHA / R
SIZES = (3, 8, 1, 4)  # samples of clients, where their weights differ
EQUAL = (1, 1, 1, 1)
DRAW = Draw(3)
ToySamples = tuple[torch.Tensor, torch.Tensor]
PLACE = "base_model.model.w."  # of a layer under PEFT


def weight() -> torch.Tensor:
    """Draw the base weight W, float64 [m, n]."""
    return torch_normal(generator(0, "weight"), M, N)


class Server:
    """Our server, to which a check gives the replies of each round.

    Args:
        method: It.
        sizes: Weights of the clients.
    """

    def __init__(self, method: Method, sizes: Sequence[float] = EQUAL) -> None:
        self.method = method
        weights = torch.tensor(sizes, dtype=torch.float64)
        self.cohort = Cohort(torch.arange(len(sizes)), weights / weights.sum())
        plan = Plan({"w": LayerView("linear", (M, N))}, shapes={"w": (M, N)})
        self.state = method.initial_state({"w": weight()}, plan, DRAW)
        self.number = 0

    def open(self) -> dict[str, torch.Tensor]:
        """Begin a round; return the factors that clients get, by label, [r, n] and the like."""
        self.number += 1
        self.sent = self.method.open_round(self.state, self.number, self.cohort, DRAW)
        factors = self.sent.adapters["w"].factors
        return {label: factor.draw().double() for label, factor in factors.items()}

    def replies(self) -> list[dict[str, torch.Tensor]]:
        """Draw what each client sends: the factors that it trained, and a change of each."""
        start = self.start = self.open()
        factors = self.sent.adapters["w"].factors
        sent = [k for k, f in factors.items() if f.trained and f.upload]
        rng = generator(self.number, "replies")
        return [
            {k: start[k] + torch_normal(rng, *start[k].shape) for k in sent}
            for _ in range(len(self.cohort))
        ]

    def close(self, replies: Sequence[Mapping[str, torch.Tensor]]) -> Tree:
        """End the round; return the weights that the server has then."""
        layout = self.sent.layout
        rows = torch.stack(
            [layout.pack({f"w/{k}": value for k, value in reply.items()}) for reply in replies]
        )
        uplinks = Uplinks(self.cohort.clients, self.cohort.weights, layout, rows)
        self.state = self.method.close_round(self.state, self.sent, uplinks)
        return self.method.weights(self.state, DRAW)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest number of theirs."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def adapted(layer: nn.Module) -> nn.Module:
    """Put PEFT's LoRA on a layer [m, n], whose tensors are below `PLACE` then."""
    model = nn.Sequential()
    model.add_module("w", layer)
    turned = not isinstance(layer, nn.Linear)
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["w"], fan_in_fan_out=turned)
    found: nn.Module = peft.get_peft_model(model, config)
    return found


def save_replies(replies: Sequence[Tree], folders: Sequence[Path], name: str) -> None:
    """Write the replies of clients into folders as code of PEFT does.

    Args:
        replies: Of each client, factors by label.
        folders: Of each client; they are made.
        name: Of a factor in the file, with ``{}`` for its label.
    """
    for reply, folder in zip(replies, folders, strict=True):
        folder.mkdir(parents=True)
        named = {name.format(label): value.float() for label, value in reply.items()}
        torch.save(named, folder / "pytorch_model.bin")


def drawn_network(model: nn.Module) -> nn.Module:
    """Draw all parameters of a network, which is returned."""
    rng = generator(0, "network")
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.05 * torch_normal(rng, *value.shape))
    return model


def network() -> nn.Module:
    """Draw a network of two layers without biases: inputs [N, n], four classes."""
    layers = nn.Linear(N, M, bias=False), nn.Tanh(), nn.Linear(M, 4, bias=False)
    return drawn_network(nn.Sequential(*layers))


def samples(clients: int = 3, each: int = 6) -> list[ToySamples]:
    """Draw those of each client for the network: inputs [N, n] and classes [N]."""
    rng = generator(0, "samples")
    inputs = torch_normal(rng, clients, each, N).float()
    return [*zip(inputs, torch.from_numpy(rng.integers(4, size=(clients, each))), strict=True)]


class Scored(nn.Module):
    """A network that returns its loss beside its outputs, as language models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @override
    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> SimpleNamespace:
        """Compute both for samples."""
        logits = self.inner(input_ids)
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def scored_batches(pair: ToySamples) -> list[dict[str, torch.Tensor]]:
    """Give the samples of a client as the one batch of a loader of texts."""
    inputs, labels = pair
    return [{"input_ids": inputs, "labels": labels, "attention_mask": torch.ones(len(labels))}]


def server_of_seeds(module: ModuleType, options: SimpleNamespace, seeds: int) -> Any:
    """Build the ``Server`` of FedKSeed's code, or of code made from it, without its model."""
    found = object.__new__(module.Server)
    found.args, found.device = options, torch.device("cpu")
    found.candidate_seeds = list(range(seeds))
    found.seed_pool = dict.fromkeys(found.candidate_seeds, 0.0)
    return found


def clients_of_seeds(module: ModuleType, server: Any) -> list[Any]:
    """Build the ``Client`` of the same code for the samples of each client."""
    clients = [
        module.Client(k, server.args, server.candidate_seeds, scored_batches(pair))
        for k, pair in enumerate(samples())
    ]
    for client in clients:
        client.device = torch.device("cpu")
    return clients


def drawn_sketches(
    model: nn.Module, method: Method, seed: int, bias: str, head: str
) -> Iterator[list[torch.Tensor]]:
    """Draw the factors A of our rounds, [n, r], one layer after another; float32.

    Args:
        model: It has the layers, all of which are adapted.
        method: Its frozen factor is A.
        seed: Of the run.
        bias: Whether biases are trained: ``full`` or ``frozen``.
        head: The name of the last layer.
    """
    draw, one = Draw(seed), torch.ones(1, dtype=torch.float64)
    plan = make_plan(model, (head,), head_policy="lora", bias_policy=bias)
    state = method.initial_state(weights_of(model), plan, draw)
    for number in range(1, ROUNDS + 1):
        sent = method.open_round(state, number, Cohort(torch.arange(1), one), draw)
        yield [adapter.factors["A"].draw().mT.float() for adapter in sent.adapters.values()]
        unchanged = torch.zeros(1, sent.layout.size)
        uplinks = Uplinks(torch.arange(1), one, sent.layout, unchanged)
        state = method.close_round(state, sent, uplinks)


def trained(model: nn.Module, data: Sequence[ToySamples], rounds: int, *words: str) -> nn.Module:
    """Train by our simulator from the weights of a model; all clients, all samples at each step.

    Args:
        model: It stays as it is.
        data: Inputs and targets of each client.
        rounds: Of the run.
        words: The method and what it needs, as on the command line.
    """
    fixed = [f"rounds={rounds}", f"clients_per_round={len(data)}", "local.batch_size=0"]
    fixed += ["local.clip=null", "output.dir=null", "output.progress=false"]
    return fedraclora.simulate(*words, *fixed, model=model, data=data, test=0).model()


class Worst:
    """The largest difference of each thing that is compared, over rounds."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def add(self, **pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Compare pairs of ours and theirs."""
        for name, pair in pairs.items():
            self.found[name] = max(self.found.get(name, 0.0), difference(*pair))

    def add_factors(self, server: Server, model: nn.Module) -> None:
        """Compare the factors that the server carries with those of a layer under PEFT."""
        state, carried = model.state_dict(), server.state.carried
        for label in ("B", "A"):
            theirs = state[f"{PLACE}lora_{label}.default.weight"]
            self.add(**{label: (carried[f"w/{label}"], theirs)})
