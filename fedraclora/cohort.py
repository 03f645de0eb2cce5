"""Local training of a whole chunk of clients as one batch.

All clients of a chunk share the frozen weights and differ only in what they train, so K clients
train as one: see `fedraclora.cohort_layers`. The result equals that of K runs of the one-client
loop in `fedraclora.local` (to 1e-10 in float64; a batched product rounds differently).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from fedraclora.cohort_layers import CohortContext, CohortDropout, cohort_layer
from fedraclora.errors import ModelError
from fedraclora.method import Adapter, Downlink, Frozen, Plan, Sketched, Trained
from fedraclora.optimiser import CohortOptimiser, LocalConfig, clip_per_client
from fedraclora.prox import add_prox
from fedraclora.recipe import RECIPES
from fedraclora.rng import cohort_permutations, hash_key
from fedraclora.samples import ClientData
from fedraclora.task import LOSSES, Task, forward
from fedraclora.tree import Tree
from fedraclora.vmapped import vmapped_losses


@dataclass(frozen=True)
class Trial:
    """What a chunk of clients brought back, in the order in which they were asked.

    Attributes:
        trained: Every trained tensor by name, [K, ...].
        losses: Mean loss over the local steps of each client, float64 [K].
        steps: Local steps taken, int64 [K].
        samples: Training samples of each client, int64 [K].
    """

    trained: Tree
    losses: torch.Tensor
    steps: torch.Tensor
    samples: torch.Tensor


@dataclass(frozen=True)
class Schedule:
    """Which sample each client sees when: positions and validity, [K, steps, width]."""

    positions: torch.Tensor
    valid: torch.Tensor
    steps: torch.Tensor  # int64 [K]

    @classmethod
    def of(
        cls, clients: torch.Tensor, sizes: torch.Tensor, local: LocalConfig, key: int
    ) -> Schedule:
        """Lay out the local steps: epochs in turn, each reshuffled, the last batch short.

        Args:
            clients: int64 [K].
            sizes: Samples per client, int64 [K], all positive.
            local: Batch size, epochs or steps, shuffling.
            key: Of the round's shuffles.

        Returns:
            The schedule.
        """
        batch = torch.full_like(sizes, local.batch_size) if local.batch_size else sizes
        per_epoch = (sizes + batch - 1) // batch
        steps = per_epoch * local.epochs if local.steps is None else torch.full_like(
            sizes, local.steps
        )
        count, width = int(steps.max()), int(batch.minimum(sizes).max())
        step = torch.arange(count, device=sizes.device)
        epoch = step // per_epoch[:, None]  # [K, steps]
        place = torch.arange(width, device=sizes.device)
        position = (step % per_epoch[:, None] * batch[:, None])[..., None] + place
        inside = (position < sizes[:, None, None]) & (place < batch[:, None, None])
        valid = inside & (step < steps[:, None])[..., None]
        position = position.clamp_(max=int(sizes.max()) - 1)
        if local.shuffle and count:
            epochs = range(int(epoch.max()) + 1)
            shuffles = torch.stack(
                [cohort_permutations(key, clients, sizes, e) for e in epochs], dim=1
            )
            flat = epoch[..., None] * shuffles.shape[2] + position
            position = shuffles.reshape(len(clients), -1).gather(1, flat.reshape(len(clients), -1))
            position = position.reshape(flat.shape)
        return cls(torch.where(valid, position, 0), valid, steps)


class CohortTrainer:
    """Trains chunks of clients of one task; keeps the rewritten model between rounds.

    Args:
        task: Model, loss and client data. The model is copied, never changed.
        plan: Views of the adapted matrices.
        local: Local settings.
        seed: Of the run.
        device: Where to train.
    """

    def __init__(
        self, task: Task, plan: Plan, local: LocalConfig, *, seed: int, device: torch.device
    ) -> None:
        refuse_mixing(task.model)
        self.task, self.plan, self.local, self.seed = task, plan, local, seed
        self.device = device
        self.data: ClientData = task.train
        self.loss = LOSSES[task.loss]
        self._programs: dict[tuple[str, ...], Program] = {}

    def train(
        self, base: Tree, downlink: Downlink, clients: torch.Tensor, *, round_: int, factor: float
    ) -> Trial:
        """Train a chunk of clients from the round's downlink.

        Args:
            base: The replica's weights.
            downlink: What to train. Per-client values are [K, ...] in the order of ``clients``.
            clients: Ids, int64 [K], each with at least one sample.
            round_: From 1; keys the shuffles.
            factor: Of the step sizes (`LocalConfig.factor`).

        Returns:
            What came out, in the order of ``clients``.
        """
        clients = clients.to(self.device)
        sizes = self.data.sizes(clients)
        key = hash_key(self.seed, "shuffle", round_)
        schedule = Schedule.of(clients, sizes, self.local, key)
        # Clients that finish first stand last, so that those still training are a prefix.
        order = torch.argsort(schedule.steps, descending=True, stable=True)
        values, starts, frozen = materialise(downlink, base, order)
        program = self._program(downlink, base)
        context = program.context
        context.seed, context.round_ = self.seed, round_
        context.scales = {n: a.scale for n, a in downlink.adapters.items()}
        slots = downlink.trained()
        rates = {n: self.local.rate(slots[n].main, factor) for n in slots}
        optimiser = CohortOptimiser(self.local, values, rates)
        hooks = [RECIPES[downlink.recipe].gradient(frozen)]
        if self.local.precondition:
            hooks.append(RECIPES["projected"].gradient(frozen))
        steps = schedule.steps[order]
        alive = [int((steps > j).sum()) for j in range(int(steps.max()) if len(steps) else 0)]
        losses = torch.zeros(len(clients), dtype=torch.float64, device=self.device)
        for j, active in enumerate(alive):
            rows = order[:active]
            leaves = {n: v[:active].detach().requires_grad_() for n, v in values.items()}
            context.active, context.clients, context.step = active, clients[rows], j
            loss = self._losses(program, downlink, leaves, frozen, schedule, rows, j)
            gradients = dict(
                zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True)
            )
            with torch.no_grad():
                losses[:active] += loss
                if self.local.prox:
                    add_prox(gradients, leaves, starts, frozen, downlink, self.local.prox)
                for hook in hooks:
                    gradients = hook(gradients)
                if self.local.clip is not None:
                    gradients = clip_per_client(gradients, self.local.clip)
                optimiser.step(gradients)
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)).to(order))
        return Trial(
            trained={name: value[back] for name, value in values.items()},
            losses=(losses / steps.clamp(min=1))[back].cpu(),
            steps=schedule.steps.cpu(),
            samples=sizes.cpu(),
        )

    def _losses(
        self,
        program: Program,
        downlink: Downlink,
        leaves: Tree,
        frozen: Tree,
        schedule: Schedule,
        rows: torch.Tensor,
        step: int,
    ) -> torch.Tensor:
        """Mean loss of each active client on its batch of this step, [active]."""
        context = program.context
        width = int(schedule.valid[rows, step].sum(dim=1).max())
        valid = schedule.valid[rows, step, :width]
        batch = self.data.gather(context.clients, schedule.positions[rows, step, :width])
        if program.model is None:
            losses, counts = vmapped_losses(
                self.task.model, program.base, downlink, self.plan, leaves, frozen, batch, self.loss
            )
        else:
            context.factors, context.dense = arrange(downlink, leaves, frozen, len(rows))
            losses, counts = self.loss(forward(program.model, batch.inputs), batch.target)
        kept = valid.to(losses.dtype)
        total = (losses.reshape(valid.shape) * kept).sum(dim=1)
        return total / (counts.reshape(valid.shape) * kept).sum(dim=1).clamp(min=1)

    def _program(self, downlink: Downlink, base: Tree) -> Program:
        """Give the rewritten model for this set of trained tensors, holding these base weights."""
        names = (*downlink.adapters, "|", *downlink.dense)
        if names not in self._programs:
            self._programs[names] = Program.build(self.task.model, downlink, self.device)
        program = self._programs[names]
        program.load(base)
        return program


@dataclass
class Program:
    """A copy of the model whose trained layers are cohort layers, or None to fall back to vmap."""

    model: nn.Module | None
    context: CohortContext
    parameters: dict[str, nn.Parameter]
    base: Tree

    @classmethod
    def build(cls, model: nn.Module, downlink: Downlink, device: torch.device) -> Program:
        """Rewrite a copy of ``model`` for what ``downlink`` trains.

        Raises:
            ModelError: If a layer can be neither rewritten nor run under vmap.
        """
        copied = copy.deepcopy(model).to(device)
        context = CohortContext()
        trained = [*downlink.adapters, *downlink.dense]
        owners = {name.rpartition(".")[0] for name in trained}
        modules = dict(copied.named_modules())
        foldable = not has_tied(copied, trained) and all(
            owner and cohort_layer(modules[owner]) is not None for owner in owners
        )
        parameters = dict(copied.named_parameters())
        dropouts = [n for n, m in modules.items() if isinstance(m, nn.Dropout) and m.p > 0]
        if not foldable:
            if dropouts and model.training:
                raise ModelError(
                    f"{dropouts[0]}: dropout cannot be used here, because a trained tensor outside "
                    "Linear, Conv1D, Conv2d, LayerNorm and Embedding needs torch.func.vmap; "
                    "set the model's dropout to 0"
                )
            return cls(None, context, parameters, {})
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for owner in owners:
            kind = cohort_layer(modules[owner])
            if kind is not None:
                replace(copied, owner, kind(modules[owner], owner, context))
        for name in dropouts:
            replace(copied, name, CohortDropout(modules[name], name, context))
        # Functional dropout and the like stay off; CohortDropout is always on.
        return cls(copied.eval(), context, parameters, {})

    def load(self, base: Tree) -> None:
        """Point the model's parameters at the replica's weights (no copy on one device)."""
        self.base = base
        if self.model is not None:
            for name, parameter in self.parameters.items():
                parameter.data = base[name]


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def has_tied(model: nn.Module, trained: list[str]) -> bool:
    """Tell whether a trained parameter is shared by two layers."""
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    unique = {n for n, _ in model.named_parameters()}
    if len(names) == len(unique):
        return False
    owner = dict(model.named_parameters(remove_duplicate=False))
    counts: dict[int, int] = {}
    for parameter in owner.values():
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return any(counts[id(owner[n])] > 1 for n in trained)


def refuse_mixing(model: nn.Module) -> None:
    """Refuse layers that mix the samples of a batch, for then a client is not a row of it.

    Raises:
        ModelError: Naming the layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:  # noqa: SLF001
            raise ModelError(
                f"layer {name!r} ({type(module).__name__}) mixes the samples of a batch in "
                "training mode, so clients cannot share a batch: freeze it with .eval(), or use "
                "GroupNorm or LayerNorm"
            )


def materialise(
    downlink: Downlink, base: Tree, order: torch.Tensor
) -> tuple[Tree, Tree, Tree]:
    """Make the tensors of a round for the clients in ``order``.

    Returns:
        Trained values [K, ...], their starts (shared ones as [1, ...]), and the frozen factors
        by "<weight>/<label>" (shared ones 2-D).
    """
    K = len(order)
    values, starts, frozen = {}, {}, {}
    for weight, adapter in downlink.adapters.items():
        like = base[weight]
        for label, factor in adapter.factors.items():
            name = f"{weight}/{label}"
            if isinstance(factor, Sketched):
                frozen[name] = factor.spec.draw().to(like.device, like.dtype)
            elif isinstance(factor, Frozen):
                value = factor.value.to(like.device, like.dtype)
                frozen[name] = value[order] if value.dim() == 3 else value
            else:
                starts[name] = start_of(factor, torch.zeros(factor.shape).to(like), order)
    for name, slot in downlink.dense.items():
        starts[name] = start_of(slot, base[name], order)
    for name, start in starts.items():
        values[name] = start.expand(K, *start.shape[1:]).clone(
            memory_format=torch.contiguous_format
        )
    return values, starts, frozen


def start_of(slot: Trained, default: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Give the start of a trained tensor as [1, ...] if shared, [K, ...] if per client."""
    if slot.start is None:
        return default[None]
    start = slot.start.to(default.device, default.dtype)
    return start[None] if start.dim() == len(slot.shape) else start[order]


def arrange(
    downlink: Downlink, leaves: Tree, frozen: Tree, active: int
) -> tuple[dict[str, list[torch.Tensor]], Tree]:
    """Sort tensors into low-rank terms and dense ones, cut to the active clients."""

    def find(weight: str, label: str) -> torch.Tensor:
        name = f"{weight}/{label}"
        if name in leaves:
            return leaves[name]
        return frozen[name][:active] if frozen[name].dim() == 3 else frozen[name]

    def chain(weight: str, adapter: Adapter) -> list[torch.Tensor]:
        return [find(weight, label) for label in adapter.factors]

    factors = {w: chain(w, a) for w, a in downlink.adapters.items()}
    return factors, {n: leaves[n] for n in downlink.dense}
