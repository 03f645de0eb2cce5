"""Models whose samples interact, which cannot be trained as one batch of many clients."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from fedraclora.data.task import forward
from fedraclora.errors import ModelError

CLOSE = 1e-3  # relative: rounding differs by batch, statistics of a batch differ by far more


def refuse_interaction(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Reject a model whose output for a sample depends on the other samples of its batch.

    Args:
        model: Not modified.
        inputs: Of samples; nothing is checked with fewer than two.

    Raises:
        ModelError: Saying what to use instead.
    """
    both = {name: values[:2] for name, values in inputs.items()}
    if not both or any(len(values) < 2 for values in both.values()):
        return
    copied = copy.deepcopy(model).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            beside, alone = (
                forward(copied, {name: values[:size] for name, values in both.items()})[0]
                for size in (2, 1)
            )
        except Exception:  # whatever is wrong with it, training says
            return
    if not torch.allclose(beside, alone, rtol=CLOSE, atol=CLOSE * float(beside.abs().max())):
        raise ModelError(
            "model.function: the output of a sample depends on the other samples of its batch "
            "(statistics over the batch, for example), so that clients cannot be trained as one "
            "batch; normalise over features (LayerNorm, GroupNorm) instead"
        )
