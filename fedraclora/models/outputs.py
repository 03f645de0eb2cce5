"""What somebody else's model gives for a sample: whether that fits the targets, and is its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from fedraclora.data.samples import Samples
from fedraclora.data.task import forward
from fedraclora.errors import DataError, ModelError

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


def refuse_outputs(model: nn.Module, samples: Samples, classes: int, loss: str) -> None:
    """Reject a model whose outputs are too few for the targets, before an index or a shape fails.

    Args:
        model: Not modified.
        samples: One or more.
        classes: Number of classes of the targets, where the loss is ``cross_entropy``.
        loss: A key of `fedraclora.data.task.LOSSES`; others than the two that are known here pass.

    Raises:
        DataError: Saying what the model gives, what the targets are and what to do.
    """
    first = samples.take(torch.tensor([0]))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            output = forward(copy.deepcopy(model).eval(), first.inputs)
        except Exception:  # whatever is wrong with it, training says
            return
    if loss == "cross_entropy" and output.dim() == 2 and output.shape[1] < classes:
        raise DataError(
            f"the model gives {output.shape[1]} outputs for a sample, but the targets go up to "
            f"class {classes - 1}, which takes {classes} outputs: number the classes from 0, or "
            "give the model an output for each; if the targets are numbers to predict, set the "
            "loss to squared_error"
        )
    if loss == "squared_error" and output.numel() != first.target.numel():
        raise DataError(
            f"the model gives {output.numel()} numbers for a sample, but its target has "
            f"{first.target.numel()}. The targets are fractions, so that the loss is "
            "squared_error: if they are classes, give them as whole numbers"
        )
