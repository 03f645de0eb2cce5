"""Take the gradients of what clients train, and name the layers that the loss does not use."""

from __future__ import annotations

import torch

from fedraclora.errors import ModelError
from fedraclora.tree import Tree


def gradients_of(loss: torch.Tensor, leaves: Tree) -> Tree:
    """Compute the gradient of a sum of losses for each trained tensor, by name.

    Args:
        loss: The losses, of any shape.
        leaves: What is trained, by its name on the uplink: ``<weight>/<factor>``, or a parameter.

    Raises:
        ModelError: If a tensor does not take part in the loss, naming the layers.
    """
    found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
    gradients = {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
    if unused := [name.partition("/")[0] for name in leaves if name not in gradients]:
        names = dict.fromkeys(n.rpartition(".")[0] or n for n in unused)
        raise ModelError(
            f"the loss does not depend on {', '.join(dict.fromkeys(unused))}, so there is nothing "
            "to train: forward does not use it. Leave it out with "
            f"'exclude_modules=[{','.join(names)}]'"
        )
    return gradients
