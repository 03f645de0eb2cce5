"""The rows of the table that run in this process, by name.

Their yardstick is one low-rank adapter trained on the samples of the whole cohort (`Central`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from fedraclora.data.task import LOSSES, Task, forward
from fedraclora.data.token_losses import output_layer, token_losses
from fedraclora.experiments.bench import late
from fedraclora.experiments.bench.runs import (
    RAY_WORKERS,
    BenchRow,
    federated_row,
    lapped,
    opened,
    ray_settings,
    trainer_maker,
)
from fedraclora.experiments.bench.usage import Laps, peak, reset_peak
from fedraclora.experiments.bench.workloads import LR, RAY, Case, Workload, all_linear_plan
from fedraclora.protocol.quantized import FULL, ROUNDED
from fedraclora.sketch import SketchSpec
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.methods.fedavg import FedAvg
from fedraclora.strategies.methods.fedavg_lora import FedAvgLora
from fedraclora.training.own.round import Round
from fedraclora.training.precision import BF16_MIXED, FLOAT32, products_in
from fedraclora.training.program import copied_layers
from fedraclora.training.results import Trained
from fedraclora.tree import Tree


class LowRankLinear(nn.Module):
    """A frozen linear layer with one low-rank term, B trained and A frozen."""

    def __init__(self, inner: nn.Linear, rank: int) -> None:
        super().__init__()
        self.inner = inner
        m, n = inner.weight.shape
        rank = min(rank, n)
        rows = torch.linalg.qr(torch.ones(n, rank) + torch.eye(n, rank))[0].T
        self.A = rows.contiguous().to(inner.weight)
        self.B = nn.Parameter(inner.weight.new_zeros(m, rank))

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [N, ..., in] to [N, ..., out]."""
        out: torch.Tensor = self.inner(x)
        return out + F.linear(F.linear(x, self.A), self.B)


class Central:
    """One model with one adapter, trained for as many steps as a client takes.

    Args:
        workload: Rank, batch and steps.
        task: The model and the data of all clients.
        at_once: Samples of this many clients go through the model at a time; gradients of a
            step are added up.
    """

    def __init__(self, workload: Workload, task: Task, at_once: int) -> None:
        plan = all_linear_plan(task)
        model = copied_layers(task.model).requires_grad_(requires_grad=False).eval()
        for name in plan.targets:
            owner = name.rpartition(".")[0]
            inner = model.get_submodule(owner)
            if isinstance(inner, nn.Linear):
                model.set_submodule(owner, LowRankLinear(inner, workload.rank))
        self.workload, self.task, self.model, self.at_once = workload, task, model, at_once
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def round(self) -> None:
        """Start from B = 0 and take the steps, each on one batch of every client."""
        workload, data = self.workload, self.task.train
        optimizer = torch.optim.SGD(self.trained, lr=LR)
        clients = torch.arange(data.num_clients, device=self.trained[0].device)
        with torch.no_grad():
            for factor in self.trained:
                factor.zero_()
        for step in range(workload.steps):
            optimizer.zero_grad()
            for part in clients.split(self.at_once):
                places = torch.arange(workload.batch, device=clients.device) + step * workload.batch
                batch = data.gather(part, places.expand(len(part), -1)).trim()
                if (head := output_layer(self.model, self.task.loss)) is not None:
                    losses, _ = token_losses(self.model, head, batch, self.trained[0].dtype)
                else:
                    outputs = forward(self.model, batch.inputs)
                    losses, _ = LOSSES[self.task.loss](outputs, batch.target)
                (losses.sum() / (len(clients) * workload.batch)).backward()
            optimizer.step()


class PlainLoop:
    """One module, one optimizer per client, a running sum.

    Args:
        workload: Whose local work is done.
        task: The task of the workload.

    Attributes:
        state: The weights after the last round.
    """

    def __init__(self, workload: Workload, task: Task) -> None:
        self.workload, self.task = workload, task
        self.state = {n: p.detach().clone() for n, p in task.model.named_parameters()}

    def round(self) -> None:
        """Train every client in turn and average."""
        model, data = self.task.model.train(), self.task.train
        sums = {n: torch.zeros_like(t) for n, t in self.state.items()}
        device = next(model.parameters()).device
        places = torch.arange(self.workload.samples, device=device).split(self.workload.batch)
        for client in torch.arange(data.num_clients, device=device).split(1):
            model.load_state_dict(self.state)
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            for place in places:
                batch = data.gather(client, place[None])
                optimizer.zero_grad()
                F.cross_entropy(forward(model, batch.inputs), batch.target).backward()
                optimizer.step()
            for name, value in model.named_parameters():
                sums[name] += value.detach()
        self.state = {n: t / data.num_clients for n, t in sums.items()}


class OwnLoop:
    """A training function of a user's (`fedraclora.client`): one model, plain SGD.

    Args:
        case: Whose local work is done.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.model.eval()

    def train(self, round_: Round) -> Trained:
        """Train one client for one round."""
        model, workload, data = round_.install(self.model), self.case.workload, round_.data
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
        total = torch.zeros(())
        for place in torch.arange(workload.samples).split(workload.batch):
            batch = data.take(place).trim()
            losses, counts = LOSSES[self.case.task.loss](forward(model, batch.inputs), batch.target)
            loss = losses.sum() / counts.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        loss = total / workload.steps
        return round_.read(model, samples=len(data), steps=workload.steps, loss=loss.item())


DEFAULT = "default"  # PEFT's name of the one adapter


class PeftLoop:
    """One model with one adapter, one client after another, a running sum, a merge.

    Args:
        case: Whose local work is done, under the sketches of the vectorized row.
        precision: Of the matrix products.
    """

    def __init__(self, case: Case, precision: str = FLOAT32) -> None:
        import peft

        self.case, self.precision, self.done = case, precision, 0
        method = FedRacLora(rank=case.workload.rank)
        _, downlink = opened(method, trainer_maker(case, method)(), case.workload.cohort)
        self.sketches: dict[str, SketchSpec] = {}
        self.scales: dict[str, float] = {}
        for weight, adapter in downlink.adapters.items():
            name, spec = weight.removesuffix(".weight"), adapter.factors["A"].drawing
            if spec is not None:
                self.sketches[name], self.scales[name] = spec, adapter.scale
        config = peft.LoraConfig(
            target_modules=[*self.sketches],
            rank_pattern={name: spec.rank for name, spec in self.sketches.items()},
            alpha_pattern={n: self.scales[n] * spec.rank for n, spec in self.sketches.items()},
        )
        inner = case.model.train()
        self.model: Any = peft.get_peft_model(inner, config)  # it replaces layers of `inner`
        self.layers: dict[str, Any] = {name: inner.get_submodule(name) for name in self.sketches}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_B" in name)

    def weights(self) -> Tree:
        """Return the weights after the last round."""
        merged = {f"{n}.weight": layer.base_layer.weight for n, layer in self.layers.items()}
        return dict(self.case.task.model.named_parameters()) | merged

    def round(self) -> None:
        """Draw A, train B from zero at each client in turn, average, and merge."""
        data, workload = self.case.task.train, self.case.workload
        B = {name: layer.lora_B[DEFAULT].weight for name, layer in self.layers.items()}
        sums = {name: torch.zeros_like(factor) for name, factor in B.items()}
        with torch.no_grad():
            for name, spec in self.sketches.items():
                drawn = replace(spec, index=self.done).draw()
                self.layers[name].lora_A[DEFAULT].weight.copy_(drawn)
        places = torch.arange(workload.samples, device=self.case.device).split(workload.batch)
        for client in torch.arange(workload.clients, device=self.case.device).split(1):
            with torch.no_grad():
                for factor in B.values():
                    factor.zero_()
            optimizer = torch.optim.SGD(B.values(), lr=LR)
            for place in places:
                batch = data.gather(client, place[None]).trim()  # to its own longest text
                optimizer.zero_grad()
                with products_in(self.precision, self.case.device):
                    loss = self.model(**batch.inputs, labels=batch.target).loss
                loss.backward()
                optimizer.step()
            for name, factor in B.items():
                sums[name] += factor.detach()
        with torch.no_grad():
            for name, layer in self.layers.items():
                A, mean = layer.lora_A[DEFAULT].weight, sums[name] / workload.clients
                layer.base_layer.weight.addmm_(mean, A, alpha=self.scales[name])
        self.done += 1


def loop(case: Case) -> BenchRow:
    """Full weights, by hand."""
    run = PlainLoop(case.workload, replace(case.task, model=case.model))
    return BenchRow(lapped(run.round), weights=lambda: run.state)


def peft(case: Case, precision: str = FLOAT32) -> BenchRow:
    """Fed-RAC-LoRA by hand, on PEFT."""
    run = PeftLoop(case, precision)
    return BenchRow(lapped(run.round), weights=run.weights if precision == FLOAT32 else None)


def checkpointed(case: Case) -> Case:
    """The same, with blocks that are computed again in the backward pass."""
    model = partial(case.workload.model, checkpointing=True)
    return replace(case, workload=replace(case.workload, model=model))


def central(case: Case) -> BenchRow:
    """Central training: in one piece, or in as many as the vectorized engine makes of it.

    Each is tried twice and the faster is kept: which it is depends on the caches.
    """
    engine = federated_row(case)
    chunk = int(engine.facts["chunk"])
    engine.close()
    tried = []
    for at_once in {case.workload.cohort, chunk}:
        limit, laps = Central(case.workload, case.task, at_once), Laps(children=False)
        for _ in range(3):
            lapped(limit.round)(laps)
        seconds = laps.cpu if case.device.type == "cpu" else laps.wall
        tried.append((min(seconds[1:]), at_once))
    at_once = min(tried)[1]
    limit = Central(case.workload, case.task, at_once)
    return BenchRow(lapped(limit.round), facts={"at once": float(at_once)})


def product(case: Case, dtype: torch.dtype) -> BenchRow:
    """One large product of square matrices: the speed that rows are held against."""
    width = 1024 if case.device.type == "cpu" else 8192
    left, right = torch.rand(2, width, width, device=case.device).to(dtype)

    def once() -> None:
        left @ right

    return BenchRow(lapped(once))


def ray(case: Case, workers: int, steps: int | None = None) -> BenchRow:
    """Chunks of clients on resident Ray workers."""
    return federated_row(case, chunk=case.workload.ray_chunk, steps=steps, workers=workers)


@contextmanager
def hosted(rows: Sequence[str], device: torch.device) -> Iterator[None]:
    """Run one Ray cluster with room for the workers of all Ray rows, if there are any.

    On a GPU they share one card, whatever there is.
    """
    if not set(rows) & set(RAY):
        yield
        return
    from fedraclora.engines.ray import Cluster

    cluster = Cluster(ray_settings(RAY_WORKERS, device), device.type)
    try:
        yield
    finally:
        cluster.close()


BUILDERS: dict[str, Callable[[Case], BenchRow]] = {
    "vectorized": federated_row,
    "central": central,
    "bf16": lambda case: federated_row(case, precision=BF16_MIXED),
    "inline": lambda case: federated_row(case, chunk=1),
    "own": lambda case: federated_row(case, chunk=1, own=OwnLoop(case).train),
    "idle": lambda case: federated_row(case, steps=0),
    "fedavg_lora": lambda case: federated_row(case, method=FedAvgLora(rank=case.workload.rank)),
    "fedavg": lambda case: federated_row(case, method=FedAvg()),  # the algorithm of the peers
    "loop": loop,
    "peft": peft,
    "peft bf16": lambda case: peft(case, BF16_MIXED),
    "checkpointing": lambda case: federated_row(checkpointed(case)),
    "peft checkpointing": lambda case: peft(checkpointed(case)),
    "ray idle": lambda case: ray(case, 2, steps=0),
    "ray x1": lambda case: ray(case, 1),
    "ray x2": lambda case: ray(case, 2),
    "cohort 1,000": federated_row,
    "cohort 10,000": lambda case: federated_row(case.of(10_000)),
    "population 1,000": federated_row,
    "population 1,000,000": lambda case: federated_row(case.of(1_000_000)),
    "product": lambda case: product(case, torch.float32),
    "product bf16": lambda case: product(case, torch.bfloat16),
    **{kind: partial(federated_row, bits=kind) for kind in (FULL, *ROUNDED)},
    **late.LATE_BUILDERS,
}


def peak_alone(row: str, workload: Workload) -> int:
    """Run the second round of a row in a process of its own; the peak of its memory, bytes.

    It is forked, so call it before this process holds a model or has computed a gradient.
    """
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(_second_round, row, workload).result()


def _second_round(row: str, workload: Workload) -> int:
    run = BUILDERS[row](Case(workload, torch.device("cpu"), alone=True))
    run.round(Laps(children=False))
    reset_peak()
    run.round(Laps(children=False))
    run.close()
    return peak()
