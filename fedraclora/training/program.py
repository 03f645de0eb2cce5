"""Rewrite a model so that one batch holds many clients, and compute gradients without autograd."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from fedraclora.data.clients import ClientData
from fedraclora.data.samples import Samples
from fedraclora.data.task import SLOPES, Task
from fedraclora.errors import ModelError
from fedraclora.lowrank.layers import is_batch_norm, layer_kind
from fedraclora.models.packed import Packer
from fedraclora.models.packed_layout import PackedLayout, packed_layout, real_tokens
from fedraclora.protocol.method import RoundInstructions
from fedraclora.protocol.program import ClientChunk, GradientFunction
from fedraclora.training.cohort_layers import (
    CohortContext,
    CohortConv2d,
    CohortDropout,
    CohortEmbedding,
    CohortLayer,
    CohortLayerNorm,
    CohortLinear,
)
from fedraclora.training.feedforward import FeedForward, written_out
from fedraclora.training.schedule import Schedule, StepBatch
from fedraclora.tree import Tree, point_at

COHORT_LAYERS: dict[type[nn.Module], type[CohortLayer]] = {
    nn.Linear: CohortLinear,
    nn.Conv2d: CohortConv2d,
    nn.LayerNorm: CohortLayerNorm,
    nn.Embedding: CohortEmbedding,
}


def cohort_layer(module: nn.Module) -> type[CohortLayer] | None:
    """Return the class that serves a module with trained tensors, or None if there is none.

    Convolutions with groups, or with non-zero padding, are left to torch.func.vmap.
    """
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
        return None
    if layer_kind(module) == "conv1d":
        return CohortLinear
    return next((c for kind, c in COHORT_LAYERS.items() if type(module) is kind), None)


@dataclass
class CohortProgram:
    """Hold a model that serves many clients.

    Attributes:
        copied: A copy of the model, in evaluation mode: functional dropout and the like stay off.
        folded: Whether its trained layers are cohort layers; else it is run under vmap.
        context: What those layers read.
        parameters: Of the copy.
        base: The replica's weights.
        plain: The model itself, if it fits into `fedraclora.training.feedforward`.
        packer: Packs batches so that blocks of the model see only real tokens, if possible.
        in_turn: Whether clients run one after another, since vmap cannot run the model.
    """

    copied: nn.Module
    folded: bool
    context: CohortContext
    parameters: dict[str, nn.Parameter]
    base: Tree
    plain: nn.Module | None = None
    packer: Packer | None = None
    in_turn: bool = False

    @classmethod
    def build(cls, task: Task, downlink: RoundInstructions, device: torch.device) -> CohortProgram:
        """Rewrite a copy of the task's model for what ``downlink`` trains.

        Raises:
            ModelError: If a layer can be neither rewritten nor run under vmap.
        """
        model = task.model
        copied = copied_layers(model).to(device)
        context = CohortContext()
        trained = [*downlink.adapters, *downlink.dense]
        owners = {name.rpartition(".")[0] for name in trained}
        modules = dict(copied.named_modules())
        foldable = not has_tied(copied, trained) and all(
            owner and cohort_layer(modules[owner]) is not None for owner in owners
        )
        parameters = dict(copied.named_parameters())
        dropouts = [n for n, m in modules.items() if isinstance(m, nn.Dropout) and m.p > 0]
        recomputed = [m for m in copied.modules() if computes_again(m)]
        if not foldable:
            if recomputed:
                raise ModelError(
                    "model.checkpointing is true, but what is trained needs torch.func.vmap, under "
                    "which blocks cannot be computed again: set model.checkpointing=false, or "
                    "train Linear, Conv1D, LayerNorm and Embedding layers alone"
                )
            if dropouts and model.training:
                raise ModelError(
                    f"{dropouts[0]}: dropout cannot be used here, because a trained tensor outside "
                    "Linear, Conv1D, Conv2d, LayerNorm and Embedding needs torch.func.vmap; "
                    "set the model's dropout to 0"
                )
            return cls(copied.eval(), False, context, parameters, {})
        packer = Packer.of(copied.eval())
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for owner in owners:
            kind = cohort_layer(modules[owner])
            if kind is not None:
                replace(copied, owner, kind(modules[owner], owner, context))
        for name in dropouts:
            replace(copied, name, CohortDropout(modules[name], name, context))
        plain = model if written_out(task, downlink) else None
        copied.eval()  # CohortDropout stays on
        for module in recomputed:
            module.training = True  # this module's own flag only: otherwise it keeps everything
        return cls(copied, True, context, parameters, {}, plain, packer)

    def pack(self, layout: PackedLayout | None) -> None:
        """Pack the blocks' batches from now on, if a layout is given."""
        if self.packer is not None:
            self.packer.use(layout)
            self.context.layout = layout

    def load(self, base: Tree) -> None:
        """Point the model's parameters at the replica's weights (no copy on one device)."""
        self.base, self.context.narrowed = base, {}
        point_at(self.parameters, base)


@dataclass(frozen=True, kw_only=True)
class OpenChunk(ClientChunk):
    """A chunk of clients, ready to train.

    Attributes:
        program: The rewritten model.
        schedule: Which sample each client sees when.
        sizes: Samples of each client, int64 [K].
        order: Positions among the asked clients, int64 [K]: active clients are a prefix.
        back: Positions of the asked clients in this order; None if it is the same.
        network: The network with its gradients written out, where it is plain enough.
        gradient_function: Computes gradients in place of those of the loss; None: the loss does.
    """

    program: CohortProgram
    schedule: Schedule
    sizes: torch.Tensor
    order: torch.Tensor
    back: torch.Tensor | None
    network: FeedForward | None
    gradient_function: GradientFunction | None = None

    def trained(self, active: int) -> Tree:
        """Return the trained tensors of the first ``active`` clients, [active, ...], as views."""
        if active == len(self.clients):
            return self.values
        return {n: v[:active] for n, v in self.values.items()}

    def leaves(self, active: int) -> Tree:
        """Return trained tensors as leaves of a new graph; see `trained`."""
        return {n: v.detach().requires_grad_() for n, v in self.trained(active).items()}

    def in_request_order(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return [K, ...] in the order in which the clients were asked."""
        return tensor if self.back is None else tensor[self.back]

    def samples(
        self, data: ClientData, step: int, batch: StepBatch
    ) -> tuple[Samples, torch.Tensor]:
        """Select the samples of a step, client after client, and the mask of valid ones.

        Args:
            data: Of all clients.
            step: The local step, from 0.
            batch: Of `Schedule.plan`.

        Returns:
            The samples [active * width], and bool [active, width].
        """
        schedule, context = self.schedule, self.program.context
        active, width, length, real = batch[:4]
        context.active, context.clients, context.step = active, self.clients[:active], step
        whole = data.gather(context.clients, schedule.positions[:active, step, :width])
        samples = whole.trim(length)
        context.tokens, context.padded = samples.padded, whole.padded
        valid = schedule.valid[:active, step, :width]
        context.places = real_tokens(samples, valid, real)
        if self.program.packer is not None:
            self.program.pack(packed_layout(samples, valid, *batch[4:]))
        return samples, valid


def written_out_gradients(
    network: FeedForward, task: Task, chunk: OpenChunk, leaves: Tree, step: int, batch: StepBatch
) -> tuple[torch.Tensor, Tree]:
    """Compute mean losses, [active], and gradients, [active, ...] by name, without autograd.

    Weights that take their steps here (`FeedForward.descend`) have no gradient in the result.

    Args:
        network: Of the chunk.
        task: Its loss and client data.
        chunk: Of `CohortTrainer.open`.
        leaves: What is trained, of the active clients.
        step: The local step, from 0.
        batch: Of `Schedule.plan`.
    """
    with torch.no_grad():
        samples, valid = chunk.samples(task.train, step, batch)
        output = network.forward(samples.inputs["x"], leaves, batch.active)
        losses, slope = SLOPES[task.loss](output, samples.target)
        share = valid.to(losses.dtype)
        share = share / share.sum(dim=1, keepdim=True)
        gradients = network.backward(slope.mul_(share.reshape(-1, 1)))
        loss = (losses.reshape(share.shape) * share).sum(dim=1)
    return loss, {n: gradients[n] for n in leaves if n in gradients}


def copied_layers(model: nn.Module) -> nn.Module:
    """Copy a model without the memory of its weights, which `CohortProgram.load` sets."""
    plain = (p for p in model.parameters() if type(p) is nn.Parameter)
    shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in plain}
    return copy.deepcopy(model, shared)


def computes_again(module: nn.Module) -> bool:
    """Check whether a transformer block is set to recompute activations in the backward pass."""
    block = any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)
    return block and bool(getattr(module, "gradient_checkpointing", False))


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def has_tied(model: nn.Module, trained: list[str]) -> bool:
    """Check whether a trained parameter is shared by two layers."""
    owner = dict(model.named_parameters(remove_duplicate=False))
    counts = Counter(map(id, owner.values()))
    return any(counts[id(owner[n])] > 1 for n in trained if n in owner)


def refuse_mixing(model: nn.Module) -> None:
    """Reject layers that mix the samples of a batch, or whose randomness cannot be seeded.

    Raises:
        ModelError: Naming the layer.
    """
    for name, module in model.named_modules():
        if is_batch_norm(module) and (module.training or module.running_mean is None):
            raise ModelError(
                f"layer {name!r} ({type(module).__name__}) normalizes by the batch, and no engine "
                "trains such layers. Its outputs for one sample depend on the others of the batch, "
                "those of other clients and padding included; and its running statistics are no "
                "weights, so no method averages them, and the server would evaluate with those "
                "from before the run. Freeze the layer: call .eval() on it where the model is "
                "built, as is usual in fine-tuning, and it applies the statistics that it has "
                "(its weight and bias can still be trained). Or build the model with GroupNorm or "
                "LayerNorm"
            )
        inside = isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout
        if inside and module.training:
            raise ModelError(
                f"layer {name!r} ({type(module).__name__}) drops values by itself, with no mask "
                "that could be seeded by client and step; set its dropout to 0"
            )
        other = isinstance(module, nn.modules.dropout._DropoutNd) and type(module) is not nn.Dropout  # noqa: SLF001
        if other and module.p:
            raise ModelError(
                f"layer {name!r} ({type(module).__name__}) has no mask seeded by client and step; "
                "use nn.Dropout, or set its p to 0"
            )
