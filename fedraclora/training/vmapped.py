"""The fall-back for models whose trained tensors cannot be folded into the batch: torch.func.vmap.

Slower (every client has its own dense effective weight), but it serves any module: tied weights,
bare parameters, layers of unknown kind.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call, vmap

from fedraclora.dora import rescaled
from fedraclora.method import Downlink, Plan
from fedraclora.samples import Samples
from fedraclora.tree import Tree


def effective_weights(
    base: Tree, downlink: Downlink, plan: Plan, values: Tree, frozen: Tree
) -> Tree:
    """Give the dense effective weights of one client.

    Args:
        base: The replica's weights.
        downlink: Says which terms there are.
        plan: Views of the adapted matrices.
        values: Trained tensors of the client, without a client axis.
        frozen: Frozen factors of the client, 2-D.

    Returns:
        Every parameter by name, in stored layout; differentiable in ``values``.
    """
    out = adapted_weights(base, downlink, plan, values, frozen)
    magnitudes = downlink.magnitudes()
    for weight, name in magnitudes.items():
        view = plan.targets[weight]
        out[weight] = view.stored(rescaled(view.matrix(out[weight]), values[name]), base[weight])
    return out | {n: values[n] for n in downlink.dense if n not in magnitudes.values()}


def adapted_weights(base: Tree, downlink: Downlink, plan: Plan, values: Tree, frozen: Tree) -> Tree:
    """Give the weights of one client with the low-rank terms alone; see `effective_weights`."""
    out = dict(base)
    for weight, adapter in downlink.adapters.items():
        names = [f"{weight}/{label}" for label in adapter.factors]
        product = torch.linalg.multi_dot([values.get(n, frozen.get(n)) for n in names])
        view = plan.targets[weight]
        out[weight] = view.stored(view.matrix(base[weight]) + adapter.scale * product, base[weight])
    return out


def vmapped_forward(
    model: nn.Module,
    base: Tree,
    downlink: Downlink,
    plan: Plan,
    leaves: Tree,
    frozen: Tree,
    batch: Samples,
    products: torch.autocast,
) -> torch.Tensor:
    """Give the outputs of all samples, [K * b, ...], with one dense weight set per client.

    The weights are formed in their own precision, the forward pass in that of ``products``.
    """
    K = next(iter(leaves.values())).shape[0]

    def split(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(K, -1, *t.shape[1:])

    per_client = {n: f[:K] for n, f in frozen.items() if f.dim() == 3}
    shared = {n: f for n, f in frozen.items() if f.dim() == 2}

    def one(values: Tree, own: Tree, inputs: Tree) -> torch.Tensor:
        weights = effective_weights(base, downlink, plan, values, shared | own)
        plain = set(inputs) == {"x"}
        with products:
            output = functional_call(
                model, weights, (inputs["x"],) if plain else (), None if plain else inputs
            )
        logits: torch.Tensor = getattr(output, "logits", output)
        return logits

    inputs = {n: split(v) for n, v in batch.inputs.items()}
    return vmap(one)(leaves, per_client, inputs).flatten(0, 1)
