"""The low-rank term in a plain model of the user's: what a dense weight does, at a lower price."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fedraclora.lowrank.layers import layer_view
from fedraclora.training.own.term import LowRankTerm
from tests.common import normal

SCALE = 0.7


def adapted(module: Any, trained: str, rank: int = 2) -> LowRankTerm:
    """Put a term on the weight of a layer."""
    view = layer_view(module)
    (m, n), r = view.shape, rank
    factors = {"B": normal(m, r, key=1), "A": normal(r, n, key=2)}
    if trained == "R":
        factors = {"B": factors["B"], "R": normal(r, r, key=3), "A": factors["A"]}
    term = LowRankTerm(view, factors, {trained}, SCALE)
    parametrize.register_parametrization(module, "weight", term, unsafe=True)
    module.parametrizations.weight.original.requires_grad_(False)
    return term


def conv1d() -> nn.Module:
    layers: Any = pytest.importorskip("transformers.pytorch_utils")
    made: nn.Module = layers.Conv1D(4, 5)
    return made


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "without bias": (lambda: nn.Linear(5, 4, bias=False), (7, 5)),
    "one sample": (lambda: nn.Linear(5, 4), (5,)),
    "conv1d": (conv1d, (2, 3, 5)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), (2, 5, 8)),
}


def adapted_parts(module: Any) -> list[nn.Module]:
    if isinstance(module, nn.TransformerEncoderLayer):
        return [module.linear1, module.linear2, module.self_attn.out_proj]
    return [module]


@pytest.mark.parametrize("trained", ["B", "R", "A"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_does_what_it_does_with_the_dense_weight(layer: str, trained: str) -> None:
    make, shape = LAYERS[layer]
    module = make().double().eval()
    dense: Any = copy.deepcopy(module)
    terms = [adapted(part, trained) for part in adapted_parts(module)]
    for part, own in zip(adapted_parts(dense), adapted_parts(module), strict=True):
        weight: Any = own.weight
        part.weight = nn.Parameter(weight.detach() * 1)
    x, out = normal(*shape, key=4), module(normal(*shape, key=4))
    slope = normal(*out.shape, key=5)
    assert type(out) is torch.Tensor
    assert torch.allclose(out, dense(x), rtol=0, atol=1e-12)
    (out * slope).sum().backward()
    (dense(x) * slope).sum().backward()
    for part, term in zip(adapted_parts(dense), terms, strict=True):
        whole: Any = part.weight
        G, factors = SCALE * term.view.matrix(whole.grad), term.factors(torch.float64)
        at = term.labels.index(trained)
        for factor in reversed(factors[at + 1 :]):
            G = G @ factor.mT
        for factor in factors[:at]:
            G = factor.mT @ G
        assert torch.allclose(getattr(term, trained).grad, G, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", ["linear", "conv1d"])
def test_a_step_forms_no_dense_weight(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = LAYERS[layer]
    module = make().double()
    adapted(module, "B")
    with monkeypatch.context() as patch:
        patch.setattr(LowRankTerm, "added", None)
        module(normal(*shape, key=4)).sum().backward()
        weight: Any = module.weight
        assert weight.shape == module.parametrizations.weight.original.shape
        assert weight.dtype is torch.float64
    assert weight.sum().requires_grad
