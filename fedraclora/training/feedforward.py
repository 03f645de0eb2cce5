"""Compute local steps of feed-forward networks with hand-written gradients.

For small layers autograd costs more than the arithmetic. A plain sequence of layers does not need
it: each layer keeps its input, and the backward pass is the same list in reverse. Other networks
are left to autograd, with the same result up to rounding.
"""

# Hooks have arguments that only some overrides use.
# ruff: noqa: ARG002

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from fedraclora.data.task import SLOPES, Task
from fedraclora.protocol.method import RoundInstructions
from fedraclora.training.adapted import times
from fedraclora.training.materialize import factor_of
from fedraclora.tree import Tree

THIN = 64  # most outputs for which a layer's weight and sketch are stacked into one product
aten = torch.ops.aten
PADDING = 16  # BLAS is up to twice as fast if the width of a thin product is a multiple of this


class WeightlessLayer:
    """A layer without weights: a function, and its backward pass from slope, input and output."""

    def __init__(
        self, there: Callable[..., torch.Tensor], back: Callable[..., torch.Tensor]
    ) -> None:
        self.there, self.back = there, back

    def forward(self, x: torch.Tensor, values: Tree, K: int) -> torch.Tensor:
        """See `Linear.forward`."""
        self.x = x
        self.output = self.there(x)
        return self.output

    def backward(
        self, slope: torch.Tensor, gradients: Tree, *, to_input: bool
    ) -> torch.Tensor | None:
        """See `Linear.backward`."""
        return self.back(slope, self.x, self.output) if to_input else None


class Linear:
    """`torch.nn.Linear` ``x W^T + s (x A^T) B^T + c`` with any of its tensors trained per client.

    Args:
        name: Of the module.
        downlink: What is trained.
        base: The replica's weights.
        frozen: Factors that are not trained.
    """

    def __init__(self, name: str, downlink: RoundInstructions, base: Tree, frozen: Tree) -> None:
        self.weight_name, self.bias_name = f"{name}.weight", f"{name}.bias"
        dense = downlink.dense
        self.weight = None if self.weight_name in dense else base[self.weight_name]
        self.bias = None if self.bias_name in dense else base.get(self.bias_name)
        self.base = base[self.weight_name]
        self.outputs = self.base.shape[0]
        adapter = downlink.adapters.get(self.weight_name)
        self.scale = 0.0 if adapter is None else adapter.scale
        labels = (
            [] if adapter is None else [f"{self.weight_name}/{label}" for label in adapter.factors]
        )
        self.B_name, self.A_name = labels or ("", "")
        self.frozen = {n: frozen[n] for n in labels if n in frozen}
        self.stack = self.stacked_bias = None
        self.room: torch.Tensor | None = None  # of a gradient
        self.rate: float | None = None  # of steps that `backward` takes itself
        A = self.frozen.get(self.A_name)
        if self.weight is not None and A is not None and A.dim() == 2 and self.outputs <= THIN:
            height = self.outputs + A.shape[0]
            spare = A.new_zeros(-height % PADDING, A.shape[1])
            self.stack = torch.cat([self.weight, A, spare])
            if self.bias is not None:
                self.stacked_bias = F.pad(self.bias, (0, len(self.stack) - self.outputs))

    def forward(self, x: torch.Tensor, values: Tree, K: int) -> torch.Tensor:
        """Map [K * b, ...]; ``values`` are the trained tensors of the K clients."""
        self.x, self.K, self.values = x, K, values
        W, bias = values.get(self.weight_name), values.get(self.bias_name)
        if self.stack is not None:
            whole = F.linear(x, self.stack, self.stacked_bias)
            out, wide = whole[:, : self.outputs], whole[:, self.outputs :]
        elif W is None:
            out, wide = F.linear(x, self.weight, self.bias), None  # type: ignore[arg-type]
        else:
            out, wide = times(x, W, K), None
            out = out if self.bias is None else out.add_(self.bias)
        if self.scale:
            B, A = (factor_of(n, values, self.frozen, K) for n in (self.B_name, self.A_name))
            self.z = times(x, A, K) if wide is None else wide[:, : A.shape[0]]
            if B.dim() == 2:
                out = torch.addmm(out, self.z, B.mT, alpha=self.scale)
            else:
                rows = torch.baddbmm(self.split(out), self.split(self.z), B.mT, alpha=self.scale)
                out = rows.view(-1, self.outputs)
        if bias is not None:
            self.split(out).add_(bias[:, None])
        return out

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """View [K * b, n] as [K, b, n]."""
        return rows.view(self.K, -1, rows.shape[-1])

    def backward(
        self, slope: torch.Tensor, gradients: Tree, *, to_input: bool
    ) -> torch.Tensor | None:
        """Add the gradients of this layer's trained tensors; return the input's, if wanted."""
        values, rows = self.values, self.split(slope)
        if self.bias_name in values:
            gradients[self.bias_name] = rows.sum(dim=1)
        W, back = values.get(self.weight_name), None
        if to_input:
            back = slope @ self.weight if W is None else torch.bmm(rows, W).flatten(0, 1)  # type: ignore[operator]
        if W is not None and self.rate is not None:
            self._descend(rows, W, self.rate)
        elif W is not None:
            # Reuse the same memory at every step: fresh memory costs more than the product.
            room = self.room = torch.empty_like(W) if self.room is None else self.room
            x = self.split(self.x)
            gradients[self.weight_name] = torch.bmm(rows.mT, x, out=room[: self.K])
        return self._through_factors(slope, gradients, back) if self.scale else back

    def _descend(self, rows: torch.Tensor, W: torch.Tensor, rate: float) -> None:
        """Take the plain SGD step inside the product, without a gradient tensor.

        Weights are rounded once; with a gradient tensor, the gradient would be rounded before the
        step.
        """
        # Client by client: with one sample each, BLAS may round a batch otherwise than one client.
        for slope, x, own in zip(
            rows.split(1), self.split(self.x).split(1), W.split(1), strict=True
        ):
            own.baddbmm_(slope.mT, x, alpha=-rate)

    def _through_factors(
        self, slope: torch.Tensor, gradients: Tree, back: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Backpropagate through the low-rank term; ``back`` is the input gradient of the weight."""
        values, rows = self.values, self.split(slope)
        if self.B_name in values:
            # As [K, r, m]: BLAS is far quicker with the long axis last, so B's values are stored
            # like that, too.
            gradients[self.B_name] = torch.bmm(self.split(self.z).mT, rows).mul_(self.scale).mT
        if back is None and self.A_name not in values:
            return None
        B, A = (factor_of(n, values, self.frozen, self.K) for n in (self.B_name, self.A_name))
        narrow = slope @ B if B.dim() == 2 else torch.bmm(rows, B).flatten(0, 1)
        narrow = narrow.mul_(self.scale)
        if self.A_name in values:
            gradients[self.A_name] = torch.bmm(self.split(narrow).mT, self.split(self.x))
        if back is None:
            return None
        if A.dim() == 2:
            return back.addmm_(narrow, A)
        self.split(back).baddbmm_(self.split(narrow), A)
        return back


def _reshaped(slope: torch.Tensor, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return slope.reshape(x.shape)


# torch has fused kernels for the gradients of activations from their outputs: one pass, where
# comparing and multiplying takes three.
WEIGHTLESS: dict[type[nn.Module], tuple[Callable[..., torch.Tensor], ...]] = {
    nn.Flatten: (lambda x: x.flatten(1), _reshaped),
    nn.Identity: (lambda x: x, _reshaped),
    nn.ReLU: (torch.relu_, lambda slope, _, out: aten.threshold_backward(slope, out, 0)),
    nn.Tanh: (torch.tanh_, lambda slope, _, out: aten.tanh_backward(slope, out)),
}
LARGE, ALIGNED = 1 << 20, 64  # bytes of a weight that fills a core's own cache; of a vector


def written_out(task: Task, downlink: RoundInstructions) -> bool:
    """Check whether a task's model, with these trained tensors, is supported here."""
    model, inputs = task.model, task.test.inputs
    if type(model) is not nn.Sequential or task.loss not in SLOPES or set(inputs) != {"x"}:
        return False
    kinds = {name: type(module) for name, module in model.named_children()}
    if len(kinds) < len(model) or not set(kinds.values()) <= {nn.Linear, *WEIGHTLESS}:
        return False  # a layer that occurs twice, or of an unsupported kind
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if len(every) > len(list(model.parameters())):
        return False  # a weight or bias shared by two layers: the base holds it under one name only
    flat = [m for m in model if isinstance(m, nn.Flatten)]
    if any((m.start_dim, m.end_dim) != (1, -1) for m in flat):
        return False
    vectors = inputs["x"].dim() == 2 or isinstance(model[0], nn.Flatten)
    pairs = all(len(adapter.factors) == 2 for adapter in downlink.adapters.values())
    # otherwise the model has something that is not a parameter
    pairs = pairs and downlink.dense.keys() <= set(every)
    owners = {n.rpartition(".")[0] for n in (*downlink.adapters, *downlink.dense)}
    return vectors and pairs and all(kinds.get(owner) is nn.Linear for owner in owners)


class FeedForward:
    """A network for the clients of one chunk.

    Args:
        model: A sequence for which `written_out` holds.
        downlink: What is trained.
        base: The replica's weights.
        frozen: Factors that are not trained.
    """

    def __init__(
        self, model: nn.Module, downlink: RoundInstructions, base: Tree, frozen: Tree
    ) -> None:
        self.stages: list[Linear | WeightlessLayer] = []
        self.at_once = 0  # bytes of a client's gradients that never exist all at once
        for name, module in model.named_children():
            if isinstance(module, nn.Linear):
                self.stages.append(Linear(name, downlink, base, frozen))
            else:
                self.stages.append(WeightlessLayer(*WEIGHTLESS[type(module)]))
        trained = {n.rpartition(".")[0] for n in (*downlink.adapters, *downlink.dense)}
        names = [name for name, _ in model.named_children()]
        # Layers before the first trained one need no gradients.
        self.first = min(names.index(name) for name in trained)

    def descend(self, rates: Mapping[str, float]) -> None:
        """Take plain SGD steps of large weights during the backward pass, without gradient tensors.

        All gradients of a chunk together would be as large as its trained tensors. A product gives
        the same bits alone and in a batch if it begins at the same alignment.

        Args:
            rates: Step size of each trained tensor.
        """
        for stage in self.stages:
            if isinstance(stage, Linear) and stage.weight_name in rates:
                size = stage.base.nbytes
                if size >= LARGE and not size % ALIGNED:
                    stage.rate = rates[stage.weight_name]
                    self.at_once += size

    def forward(self, x: torch.Tensor, values: Tree, K: int) -> torch.Tensor:
        """Map [K * b, ...] to [K * b, outputs].

        Args:
            x: The batch, client after client.
            values: What is trained, [K, ...] by name.
            K: Clients in the batch.
        """
        for stage in self.stages:
            x = stage.forward(x, values, K)
        return x

    def backward(self, slope: torch.Tensor) -> Tree:
        """Compute the gradients, [K, ...] by name, from that of the last output."""
        gradients: Tree = {}
        back: torch.Tensor | None = slope
        for place in range(len(self.stages) - 1, self.first - 1, -1):
            if back is not None:
                back = self.stages[place].backward(back, gradients, to_input=place > self.first)
        return gradients
