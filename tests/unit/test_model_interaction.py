"""Models of one's own: samples that interact are refused, torch's own transformer blocks train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedraclora.config.build import fix_bits
from fedraclora.errors import ModelError
from fedraclora.models.outputs import refuse_interaction


class Centred(nn.Module):
    """A layer whose outputs are centred over an axis."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = nn.Linear(5, 3), axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.layer(x)
        return hidden - hidden.mean(dim=self.axis, keepdim=True)


def test_statistics_of_a_batch_are_refused() -> None:
    x = torch.arange(20.0).reshape(4, 5).sin()
    with pytest.raises(ModelError, match="depends on the other samples of its batch"):
        refuse_interaction(Centred(0), {"x": x})
    refuse_interaction(Centred(1), {"x": x})
    refuse_interaction(Centred(0), {"x": x[:1]})  # with one sample nothing is seen
    refuse_interaction(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).train(), {"x": x})


def test_a_transformer_block_of_torch_has_derivatives_in_evaluation_mode() -> None:
    """Local training runs models in evaluation mode, where torch takes a path that has none."""
    fix_bits(1, torch.device("cpu"))
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).eval()
    weights = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, weights, (torch.ones(1, 3, 6),)).square().sum()

    gradients = torch.func.grad(loss)(weights)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
