"""Local steps of feed-forward networks with the gradients written out.

For small layers autograd costs more than their arithmetic. A network that is a plain sequence of
layers needs none: each layer keeps its input, and the way back is the same list in reverse. What
does not fit in here is left to autograd, with the same result but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fedraclora.data.task import SLOPES, Task
from fedraclora.protocol.method import Downlink
from fedraclora.training.stages import ACTIVATIONS, SHAPES, Flatten, Linear, Stage
from fedraclora.tree import Tree

LARGE, ALIGNED = 1 << 20, 64  # bytes of a weight that fills a core's own cache; of a vector


def written_out(task: Task, downlink: Downlink) -> bool:
    """Check whether a task fits in here, with what is trained of its model."""
    model, inputs = task.model, task.test.inputs
    if type(model) is not nn.Sequential or task.loss not in SLOPES or set(inputs) != {"x"}:
        return False
    kinds = {name: type(module) for name, module in model.named_children()}
    if len(kinds) < len(model) or not set(kinds.values()) <= {nn.Linear, *SHAPES, *ACTIVATIONS}:
        return False  # a layer that occurs twice, or one that is not known here
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if len(every) > len(list(model.parameters())):
        return False  # a weight or bias that two layers share: the base holds it by one name only
    flat = [m for m in model if isinstance(m, nn.Flatten)]
    if any((m.start_dim, m.end_dim) != (1, -1) for m in flat):
        return False
    vectors = inputs["x"].dim() == 2 or isinstance(model[0], nn.Flatten)
    pairs = all(len(adapter.factors) == 2 for adapter in downlink.adapters.values())
    pairs = pairs and downlink.dense.keys() <= set(every)  # else it has what is no parameter
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

    def __init__(self, model: nn.Module, downlink: Downlink, base: Tree, frozen: Tree) -> None:
        self.stages: list[Stage] = []
        self.at_once = 0  # bytes of a client's gradients that are never there all together
        for name, module in model.named_children():
            if isinstance(module, nn.Linear):
                self.stages.append(Linear(name, downlink, base, frozen))
            elif type(module) in ACTIVATIONS:
                self.stages.append(ACTIVATIONS[type(module)]())
            else:
                self.stages.append(Flatten(module))
        trained = {n.rpartition(".")[0] for n in (*downlink.adapters, *downlink.dense)}
        names = [name for name, _ in model.named_children()]
        # Nothing before the first layer that is trained has gradients.
        self.first = min(names.index(name) for name in trained)

    def descend(self, rates: Mapping[str, float]) -> None:
        """Have large weights take the steps of plain SGD without gradients of their own.

        All gradients of a chunk at once would be as large as what it trains. A product has the
        same bits alone and in a batch where it begins at the same alignment.

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
