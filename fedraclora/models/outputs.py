"""What somebody else's model and loss give for a sample: whether it fits, and is its own.

Local training holds samples of many clients in one batch, and runs a model in evaluation mode, with
masks of its own for `torch.nn.Dropout`. So a sample may not depend on the others of its batch, and
the model may not be another in training mode. Both are looked at before the first round, on a few
samples and at weights that are moved a little, since a layer that is zero hides all before it.
"""

from __future__ import annotations

import copy
import random  # noqa: TID251  (it is looked at, and put back)
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from fedraclora.data.dataset import DataSet
from fedraclora.data.own_loss import PASSING, OwnLoss, check_loss, is_own
from fedraclora.data.samples import Samples
from fedraclora.data.task import forward, read_as
from fedraclora.errors import DataError, ModelError
from fedraclora.imports import told_as
from fedraclora.lowrank.layers import is_batch_norm
from fedraclora.models.built import refuse_functions
from fedraclora.tree import Tree

CLOSE = 1e-3  # relative: rounding differs by batch, statistics of a batch differ by far more
MOVED = 0.01  # of the weights
DRAWS = 16  # passes of a model that draws numbers in training mode
DIRECTIONS = 4  # by which a gradient is told from another
OUTPUT = "the output of the model"
T = TypeVar("T")


def probe(
    model: nn.Module,
    samples: Samples,
    data: DataSet,
    device: torch.device,
    *,
    own_model: bool = True,
    own_loop: bool = False,
) -> DataSet:
    """Reject a model or a loss of somebody else's that cannot be trained as it is meant.

    Args:
        model: In training mode but for what is frozen. Not modified.
        samples: One or more.
        data: Their loss, and number of classes.
        device: Where losses are formed.
        own_model: False for a model of this project, which is known.
        own_loop: Whether the user's own loop trains, whose loss is not this one.

    Returns:
        The data set, with a guess for which loss outputs are read in the place of the user's own.

    Raises:
        FedRacLoraError: Saying what is wrong with it, and what to do.
    """
    like = data.like
    if is_own(data.loss):
        rows = torch.tensor([0, len(samples) // 2, len(samples) - 1, 0])  # one of them twice
        some = samples.take(rows)
        with nothing_drawn(), torch.no_grad():
            output = output_of(moved(model).eval(), some.inputs).to(device)
            check_loss(OwnLoss.of(data.loss), output, some.target.to(device), scalar=own_loop)
        like = like or guessed_like(output, samples.target)
    if own_model:
        refuse_functions(model, samples.inputs)
        refuse_outputs(model, samples, data.classes, like or data.loss)
        refuse_ways(model, samples.inputs)
    return replace(data, like=like)


def guessed_like(output: torch.Tensor, target: torch.Tensor) -> str:
    """Guess from their shapes for which loss outputs and targets are; empty where several could be.

    Example:
        >>> guessed_like(torch.randn(2, 3), torch.tensor([0, 2]))
        'cross_entropy'
    """
    given, of = [*output.shape[1:]], [*target.shape[1:]]
    if target.is_floating_point():
        fractions = not bool((target == target.round()).all())
        return "squared_error" if fractions and prod(given) == prod(of) else ""
    least, most = int(target.min()), int(target.max())
    if not of and prod(given) == 1:
        return "logistic" if least >= 0 and most <= 1 else ""
    if len(of) in {0, 2} and [*given[1:]] == of and most < given[0]:
        of_classes = "pixel_classes" if of else "cross_entropy"
        return "" if are_probable(output.double(), 1) else of_classes
    return ""


def are_probable(output: torch.Tensor, axis: int) -> bool:
    """Check whether outputs are probabilities along an axis."""
    sums = output.sum(dim=axis)
    return bool((output >= 0).all()) and close(sums, torch.ones_like(sums))


def is_softmax(model: nn.Module, samples: Samples, loss: str) -> bool:
    """Check whether what a loss takes for logits are probabilities: a model ends in a softmax."""
    if (axis := read_as(loss).axis) is None or not (some := few(samples.inputs)):
        return False
    with nothing_drawn(), torch.no_grad():
        output = output_of(copy.deepcopy(model).eval(), some)
    return are_probable(output, axis % (output.dim() - 1) + 1)


def output_of(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Call a model; what it raises is told with the shapes of its inputs.

    Raises:
        ModelError: If it raises, or gives no tensor.
    """
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    told, what = (
        "the model cannot be used with these data: ",
        "calling it with inputs of the shapes",
    )
    with told_as(ModelError, told, f"{what} {shapes}", passing=PASSING):
        return forward(model, dict(inputs))


def refuse_ways(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Reject a model that batches, modes or calls change, but by dropout: one copy answers it all.

    Args:
        model: In training mode but for what is frozen. Not modified.
        inputs: Of samples; nothing is checked with fewer than two.

    Raises:
        ModelError: If it writes into its inputs, gives something else when it is called again or
            beside other samples, or in training mode gives other outputs or gradients; the first
            module that does is named.
    """
    if not (some := few(inputs)):
        return
    with nothing_drawn():
        copied = moved(model)
        for module in copied.modules():  # what drops values by itself is refused elsewhere
            if isinstance(module, nn.modules.dropout._DropoutNd):  # noqa: SLF001
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
                module.dropout = 0.0
            elif is_batch_norm(module):
                module.eval()
        flags = {module: module.training for module in copied.modules()}
        copied.eval()
        with torch.no_grad():
            given = {name: values.clone() for name, values in some.items()}
            first = output_of(copied, given)
            if odd := next((n for n, values in given.items() if not values.equal(some[n])), ""):
                raise ModelError(
                    f"the model writes into its input {odd}, and so into the samples: compute it "
                    "anew (x * 2 in the place of x.mul_(2))"
                )
            alone = output_of(copied, {name: values[:1] for name, values in some.items()})
        wanted = traced(copied, some, lambda _, value: value)
        if not same(first, wanted[OUTPUT]):
            raise ModelError(
                "the model gives something else each time that it is called with the same inputs "
                "in evaluation mode: it draws numbers, which no seed of the run fixes, or keeps "
                "something from call to call. Draw none but by torch.nn.Dropout, and keep nothing"
            )
        if first.shape[:1] != (2,) or not close(first[:1], alone):
            raise ModelError(
                "the output of the model for a sample depends on the other samples of its batch "
                "(statistics over the batch, for example), so that clients cannot be trained as "
                "one batch; normalize over features (LayerNorm, GroupNorm) instead"
            )
        for module, flag in flags.items():
            module.training = flag
        fits: dict[str, bool] = {}
        for draw in range(DRAWS):
            torch.default_generator.manual_seed(draw)
            before = generators()
            fits = traced(copied, some, lambda name, value: same(value, wanted.get(name)))
            if not all(fits.values()) or not drew(before):
                break
    if odd := next((name for name, fit in fits.items() if not fit), ""):
        raise ModelError(
            f"{odd} is another in training mode than in evaluation mode (a branch on "
            "self.training, for example). Local training runs the model in evaluation mode, with "
            "torch.nn.Dropout alone switched on, so that this part would never run: drop values by "
            "torch.nn.Dropout, and compute the rest alike in both modes"
        )


def few(inputs: Mapping[str, torch.Tensor]) -> Tree:
    """Take the first and the last sample; nothing where there are fewer than two."""
    count = min(map(len, inputs.values()), default=0)
    rows = torch.tensor([0, count - 1])
    return {name: values[rows] for name, values in inputs.items()} if count > 1 else {}


def moved(model: nn.Module) -> nn.Module:
    """Copy a model, with weights that can be trained; those of equal numbers are moved a little."""
    copied = copy.deepcopy(model)
    torch.default_generator.manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            if type(parameter) is nn.Parameter and parameter.is_floating_point():
                parameter.requires_grad_()
                if bool((parameter == parameter.flatten()[:1]).all()):
                    parameter.add_(MOVED * torch.randn_like(parameter))
    return copied


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Check whether two tensors are equal but for rounding."""
    if found.shape != wanted.shape:
        return False
    wide = torch.promote_types(found.dtype, torch.float32)
    found, wanted = found.to(wide), wanted.to(wide)
    if torch.equal(found, wanted):  # the rest takes several times their memory
        return True
    finite = wanted[torch.isfinite(wanted)].abs()
    size = float(finite.max()) if len(finite) else 0.0
    return torch.allclose(found, wanted, CLOSE, CLOSE * size, equal_nan=True)


def same(found: torch.Tensor | None, wanted: torch.Tensor | None) -> bool:
    """Check whether two tensors are `close`, or both are missing."""
    if found is None or wanted is None:
        return found is wanted
    return close(found, wanted)


def traced(
    model: nn.Module, inputs: Tree, look: Callable[[str, torch.Tensor | None], T]
) -> dict[str, T]:
    """Pass samples through a model, forward and back, and look at what comes, one by one.

    Returns:
        By name what ``look`` makes of the outputs of the modules, in order, then of that of the
        model and of the gradients of the weights, None where there is none; of a module that is
        called often it is the last.
    """
    found: dict[str, T] = {}

    def watch_module(name: str, module: nn.Module) -> Any:
        def seen(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor):
                found[name] = look(name, output.detach().clone())

        return module.register_forward_hook(seen)

    def watch_weight(name: str, weight: nn.Parameter) -> Any:
        def seen(weight: torch.Tensor) -> None:
            if weight.grad is not None:
                found[name], weight.grad = look(name, projected_gradient(weight.grad)), None

        weight.grad = None
        return weight.register_post_accumulate_grad_hook(seen)

    weights = {f"the gradient of {n}": p for n, p in model.named_parameters() if p.requires_grad}
    handles = [
        watch_module(f"layer {name!r} ({type(module).__name__})", module)
        for name, module in model.named_modules()
        if name and not isinstance(module, torch.jit.ScriptModule)  # which take none
    ]
    handles += [watch_weight(name, weight) for name, weight in weights.items()]
    try:
        with torch.enable_grad():
            output = output_of(model, inputs)
            found[OUTPUT] = look(OUTPUT, output.detach())
            found |= {name: look(name, None) for name in weights}
            if output.requires_grad:
                slopes = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
                (output * slopes.to(output)).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def projected_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """Multiply its rows by a few random vectors: whole, all gradients take as much as the model."""
    if gradient.dim() < 2:
        return gradient
    rows, drawn = gradient.flatten(1), torch.Generator().manual_seed(0)
    return rows @ torch.randn(rows.shape[1], DIRECTIONS, generator=drawn).to(rows)


def generators() -> tuple[Any, ...]:
    """Read the states of the global generators of torch, Python and numpy."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def drew(before: tuple[Any, ...]) -> bool:
    """Check whether one of the `generators` has moved on."""
    now = generators()
    moved_on = not torch.equal(before[0], now[0]) or before[1] != now[1]
    return moved_on or not all(map(np.array_equal, before[2], now[2]))


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Put the generators of torch, Python and numpy back at the end."""
    states = generators()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def refuse_outputs(model: nn.Module, samples: Samples, classes: int, loss: str) -> None:
    """Reject a model whose outputs do not fit the targets, before an index or a shape fails.

    Args:
        model: Not modified.
        samples: One or more.
        classes: Number of classes of the targets, where the loss is one of classes.
        loss: A key of `fedraclora.data.task.LOSSES`; others pass.

    Raises:
        DataError: Saying what the model gives, what the targets are and what to do.
        ModelError: If it cannot be called.
    """
    first = samples.take(torch.zeros(1, dtype=torch.int64, device=samples.target.device))
    with nothing_drawn(), torch.no_grad():
        output = output_of(copy.deepcopy(model).eval(), first.inputs)
    if loss == "cross_entropy" and output.dim() == 2 and output.shape[1] < classes:
        raise DataError(
            f"the model gives {output.shape[1]} outputs for a sample, but the targets go up to "
            f"class {classes - 1}, which takes {classes} outputs: number the classes from 0, or "
            "give the model an output for each; if the targets are numbers to predict, set the "
            "loss to squared_error; of one score for classes 0 and 1, to logistic"
        )
    if read_as(loss).numbers and output.numel() != first.target.numel():
        raise DataError(
            f"the model gives {output.numel()} numbers for a sample, but with the loss {loss} its "
            f"target has {first.target.numel()}: give the model as many outputs; if the targets "
            "are classes, give them as whole numbers, with the loss cross_entropy"
        )
    if (axis := read_as(loss).axis) is not None:
        given, of = [*output.shape[1:]], [*first.target.shape[1:]]
        place = 0 if axis == 0 else len(of)
        wanted = [*of[:place], classes, *of[place:]]
        fits = len(given) == len(wanted) and given[place] >= classes
        if not fits or [*given[:place], *given[place + 1 :]] != of:
            raise DataError(
                f"the model gives an output of shape {tuple(given)} for a sample; with the loss "
                f"{loss} and a target of shape {tuple(of)} it is {tuple(wanted)}, of which the "
                f"{classes} are classes and may be more: take the loss or the model that fits"
                + (f" (-100 in a target has no loss, where yours has {classes - 1})" if of else "")
            )
