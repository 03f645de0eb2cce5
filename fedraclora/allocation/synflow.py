"""SYNFLOW: how much of what flows through a network goes through each adapter; it needs no data.

    R = 1^T f(1), f the network with every parameter by its magnitude: effective weights are then
    |W| + s |B| |A|;  score of a layer: sum |theta dR/dtheta| over its trained factors

Where one factor is at zero every score is 0. The network is taken as it is, in evaluation: its
activations stay, where the paper has linear ones in mind.

References:
    Tanaka et al., *Pruning neural networks without any data by iteratively conserving synaptic
    flow*, NeurIPS 2020, arXiv 2006.05467; for adapters: HeteroLoRA, arXiv 2406.14956, whose public
    code takes the loss for R.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.func import functional_call

from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError
from fedraclora.protocol.method import Downlink, Plan
from fedraclora.training.materialise import materialise
from fedraclora.training.vmapped import effective_weights
from fedraclora.tree import Tree


def flows(
    model: nn.Module, like: Samples, base: Tree, sent: Downlink, plan: Plan
) -> dict[str, float]:
    """Score every adapter of a downlink.

    Args:
        model: The network. Not modified.
        like: Samples of the task, for the shape of an input.
        base: The base weights.
        sent: Where clients would start; of starts of their own the first client's counts.
        plan: Views of the adapted matrices.

    Returns:
        Scores by weight, in the order of the downlink.

    Raises:
        ConfigError: If an input is not one tensor of numbers, so that none can be all ones.
    """
    x = like.inputs.get("x")
    if set(like.inputs) != {"x"} or x is None or not x.is_floating_point():
        raise ConfigError(
            "allocation.proxy is synflow, which puts ones in the place of all inputs, but the "
            f"inputs of these data are {', '.join(like.inputs)}, and not numbers alone; take "
            "proxy=grad_norm"
        )
    wide = {name: tensor.double().abs() for name, tensor in base.items()}
    trained, _, frozen = materialise(sent, wide, torch.tensor([0]))
    values = {n: t[0].abs() for n, t in trained.items()}
    frozen = {n: (t[0] if t.dim() == 3 else t).abs() for n, t in frozen.items()}
    leaves = {n: values[n].requires_grad_() for n in values if n not in sent.dense}
    weights = effective_weights(wide, sent, plan, values, frozen)
    network = copy.deepcopy(model).double().eval()
    output = functional_call(network, weights, (torch.ones_like(x[:1], dtype=torch.float64),))
    found = torch.autograd.grad(output.sum(), list(leaves.values()))
    scores = dict.fromkeys(sent.adapters, 0.0)
    for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
        scores[name.rpartition("/")[0]] += float((leaf.detach() * gradient).abs().sum())
    return scores
