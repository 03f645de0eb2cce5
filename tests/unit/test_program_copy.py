"""A program has layers of its own over weights that it does not copy."""

from __future__ import annotations

import torch
from torch import nn

from fedraclora.training.program import copied_layers


def test_layers_are_copied_and_the_memory_of_weights_is_not() -> None:
    first, last = nn.Linear(3, 5), nn.Linear(3, 5)
    last.weight = first.weight  # tied
    model = nn.Sequential(first, nn.Linear(5, 3), last)
    kept = first.weight.detach().clone()
    copied = copied_layers(model)
    assert copied.get_submodule("0") is not first
    for name, weight in copied.named_parameters():
        assert weight is not model.get_parameter(name)
        assert weight.data_ptr() == model.get_parameter(name).data_ptr()
    assert copied.get_parameter("2.weight") is copied.get_parameter("0.weight")
    copied.requires_grad_(False)
    copied.get_parameter("0.weight").data = torch.zeros(5, 3)  # as `Program.load` does
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(first.weight, kept)
