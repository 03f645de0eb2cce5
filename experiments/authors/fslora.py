"""FSLoRA: whole rounds of ``fl_slora_train_llama_het`` with AdamW, on one layer with PEFT's names.

The code looks for parameters whose whole name is ``lora_A`` or ``lora_B``: under PEFT no name is,
so that no client is sketched; here they are. It draws other components for B than for A, and as
many drawings as there are parameters: it is given ours, the same for both.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from typing_extensions import override

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import ROUNDS, N, Worst, drawn_network, samples, trained
from fedraclora.protocol.method import Draw
from fedraclora.protocol.plan import make_plan
from fedraclora.strategies.methods.fslora import FsLora
from fedraclora.tree import Tree, weights_of

SEED, RANK, SHARE, SCALE, STEPS, LR, CLASSES, CLIENTS = 11, 4, 0.5, 1.5, 4, 0.02, 4, 3
METHOD = FsLora(rank=RANK, alpha=SCALE * RANK, share=SHARE)
PATH = "src/LoRA_Sketching.py"


def network() -> nn.Sequential:
    """Draw a network of one layer."""
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(N, CLASSES, bias=False))
    drawn_network(model)
    return model


def begun() -> tuple[Any, Tree]:
    """Return our first state: the layer, and both factors by label."""
    plan = make_plan(network(), ("layer",), head_policy="lora", bias_policy="frozen")
    state = METHOD.initial_state(weights_of(network()), plan, Draw(SEED))
    layer = next(METHOD.layers_of(state))
    return layer, layer.carried


class Adapted(nn.Module):
    """The layer with factors, and what the code asks of a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights_of(network())["layer.weight"], requires_grad=False)
        factors = begun()[1]
        self.lora_B, self.lora_A = (nn.Parameter(factors[k].float().clone()) for k in ("B", "A"))
        self.config = SimpleNamespace(use_cache=False)

    def enable_input_require_grads(self) -> None:
        """Do nothing: inputs are numbers."""

    def gradient_checkpointing_enable(self) -> None:
        """Do nothing: the layer is small."""

    @override
    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> SimpleNamespace:
        output = input_ids @ (self.weight + SCALE * self.lora_B @ self.lora_A).mT
        return SimpleNamespace(loss=nn.functional.cross_entropy(output, labels))


class Drawings:
    """Our components in place of the code's permutations."""

    def __init__(self) -> None:
        self.round_, self.client = 0, -1
        self.layer, self.left = begun()[0], 0

    def randperm(self, count: int) -> torch.Tensor:
        """Give clients in their order, or the components of the next one, for each parameter."""
        if self.round_ == 0 or (self.client == CLIENTS - 1 and not self.left):
            self.round_, self.client = self.round_ + 1, -1
            return torch.arange(CLIENTS)
        if not self.left:
            self.client, self.left = self.client + 1, 3
        self.left -= 1
        chosen = METHOD.chosen(self.layer, self.round_, torch.tensor([self.client]))[0]
        rest = [k for k in range(count) if k not in chosen]
        return torch.cat([chosen, torch.tensor(rest)])


def theirs(module: Any, rounds: int) -> torch.Tensor:
    """Train by the code; return the effective weight of the server."""
    model = Adapted()
    options = SimpleNamespace(
        num_comm_rounds=rounds, clients=CLIENTS, server_batch=CLIENTS, local_iter_per_round=STEPS
    )
    stub = SimpleNamespace(
        device=torch.device("cpu"),
        state=SimpleNamespace(num_processes=1, local_process_index=0),
        prepare=lambda *parts: parts,
        backward=lambda loss: loss.backward(),
        reduce=lambda value, **_: value,
        free_memory=lambda: None,
        wait_for_everyone=lambda: None,
        is_main_process=False,
    )
    loaders = [[{"input_ids": x, "labels": y, "attention_mask": x}] for x, y in samples(CLIENTS)]
    with patch.object(module, "args", options), patch("torch.randperm", Drawings().randperm):
        module.fl_slora_train_llama_het(
            model, loaders, "sgd", 1.0, LR, rounds, RANK, [METHOD.count(RANK)] * CLIENTS, stub, 0
        )
    return (model.weight + SCALE * model.lora_B @ model.lora_A).detach()


def compare(code: Repository) -> Findings:
    """Compare the effective weight after each round."""
    worst = Worst()
    words = ["method=fslora", f"method.rank={RANK}", f"method.alpha={SCALE * RANK}"]
    words += [f"method.share={SHARE}", f"seed={SEED}", "head=lora", "bias=frozen"]
    words += ["local=adamw", f"local.lr={LR}", f"local.steps={STEPS}"]
    with code.modules(PATH, root="src", unused=("arg",)) as [module]:
        for rounds in range(1, ROUNDS + 1):
            ours = trained(network(), samples(CLIENTS), rounds, *words).state_dict()
            worst.add(W=(ours["layer.weight"], theirs(module, rounds)))
    return worst.found


CHECK = CodeCheck(
    "fslora",
    "wenzhifang/Federated-Sketching-LoRA-Implementation",
    "ac24177",
    f"whole rounds with training by AdamW, {ROUNDS} rounds",
    compare,
)
