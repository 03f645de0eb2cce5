"""Models of other packages: what their function gives is taken as it is, BatchNorm included."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import nn

from fedraclora.errors import ModelError
from fedraclora.models.custom import build_function
from fedraclora.training.program import refuse_mixing

Make = Callable[[nn.Module], nn.Module]


def network(*, seen: bool = True) -> nn.Module:
    """A network with BatchNorm and dropout; ``seen``: its statistics are those of some data."""
    model = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    norm = model[1]
    assert isinstance(norm.running_mean, torch.Tensor)
    if seen:
        norm.running_mean += 0.25
    return model


@pytest.fixture
def build() -> Iterator[Make]:
    """Build a model through ``model.function``."""
    module = ModuleType("someones_package")
    sys.modules["someones_package"] = module

    def given(model: nn.Module) -> nn.Module:
        module.network = lambda shape, classes: model  # type: ignore[attr-defined]
        return build_function(
            function="someones_package:network", head=["3"], shape=(7,), classes=3, seed=0
        ).model

    yield given
    del sys.modules["someones_package"]


def test_batch_norm_that_is_frozen_stays_so(build: Make) -> None:
    model = network()
    model[1].eval()  # type: ignore[index]
    built = build(model)
    assert [m.training for m in built] == [True, False, True, True]  # type: ignore[attr-defined]
    refuse_mixing(built)
    assert [m.training for m in build(network().eval())] == [True, False, True, True]  # type: ignore[attr-defined]


def test_batch_norm_in_training_is_refused_with_the_reason(build: Make) -> None:
    with pytest.raises(ModelError, match=r"layer '1' \(BatchNorm1d\).*no method averages.*\.eval"):
        refuse_mixing(build(network()))


def test_batch_norm_that_is_frozen_without_statistics_is_refused(build: Make) -> None:
    with pytest.raises(ModelError, match=r"layer '1' \(BatchNorm1d\).*pretrained.*GroupNorm"):
        build(network(seen=False).eval())
