"""Check that a user's model and loss fit the data and treat each sample by itself.

Local training holds samples of many clients in one batch, and runs a model in evaluation mode, with
its own masks for `torch.nn.Dropout`. So a sample may not depend on the others in its batch, and the
model may not compute something else in training mode. Both are checked before the first round, on a
few samples and at slightly perturbed weights, since a layer of zeros would hide all layers before
it.
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
from fedraclora.imports import as_user_error
from fedraclora.lowrank.layers import is_batch_norm
from fedraclora.models.built import refuse_functions
from fedraclora.tree import Tree

# relative: rounding differs a little between batches, batch statistics differ far more
CLOSE = 1e-3
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
    """Reject a user's model or loss that cannot be trained correctly.

    Args:
        model: In training mode except for frozen parts. Not modified.
        samples: One or more.
        data: Their loss, and number of classes.
        device: Where losses are computed.
        own_model: False for a model of this project, which needs no check.
        own_loop: Whether the user's own loop trains, with another loss.

    Returns:
        The data set, with the guessed built-in loss whose outputs are read like the user's own.

    Raises:
        FedRacLoraError: Naming the problem and its solution.
    """
    like = data.like
    if is_own(data.loss):
        rows = torch.tensor([0, len(samples) // 2, len(samples) - 1, 0])  # one sample twice
        some = samples.take(rows)
        with restored_generators(), torch.no_grad():
            output = output_of(perturbed_copy(model).eval(), some.inputs).to(device)
            check_loss(OwnLoss.of(data.loss), output, some.target.to(device), scalar=own_loop)
        like = like or guessed_like(output, samples.target)
    if own_model:
        refuse_functions(model, samples.inputs)
        refuse_outputs(model, samples, data.classes, like or data.loss)
        refuse_ways(model, samples.inputs)
    return replace(data, like=like)


def guessed_like(output: torch.Tensor, target: torch.Tensor) -> str:
    """Guess from their shapes for which loss outputs and targets are; empty if several fit.

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
    """Check whether a model returns probabilities where the loss expects logits."""
    if (axis := read_as(loss).axis) is None or not (some := edge_samples(samples.inputs)):
        return False
    with restored_generators(), torch.no_grad():
        output = output_of(copy.deepcopy(model).eval(), some)
    return are_probable(output, axis % (output.dim() - 1) + 1)


def output_of(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Call a model; its errors are reported with the shapes of its inputs.

    Raises:
        ModelError: If it raises, or returns no tensor.
    """
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    context, what = (
        "the model cannot be used with these data: ",
        "calling it with inputs of the shapes",
    )
    with as_user_error(ModelError, context, f"{what} {shapes}", passing=PASSING):
        return forward(model, dict(inputs))


def refuse_ways(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Reject a model whose result changes with the batch, the mode or the call, except by dropout.

    Args:
        model: In training mode except for frozen parts. Not modified.
        inputs: Of samples; nothing is checked with fewer than two.

    Raises:
        ModelError: If it writes into its inputs, or if its outputs or gradients change with a
            second call, with other samples in the batch, or in training mode; the first such module
            is named.
    """
    if not (some := edge_samples(inputs)):
        return
    with restored_generators():
        copied = perturbed_copy(model)
        for module in copied.modules():  # dropout as a function is refused elsewhere
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


def edge_samples(inputs: Mapping[str, torch.Tensor]) -> Tree:
    """Select the first and the last sample; empty if there are fewer than two."""
    count = min(map(len, inputs.values()), default=0)
    rows = torch.tensor([0, count - 1])
    return {name: values[rows] for name, values in inputs.items()} if count > 1 else {}


def perturbed_copy(model: nn.Module) -> nn.Module:
    """Copy a model with trainable weights; constant weights are perturbed a little."""
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
    """Check whether two tensors are equal up to rounding."""
    if found.shape != wanted.shape:
        return False
    wide = torch.promote_types(found.dtype, torch.float32)
    found, wanted = found.to(wide), wanted.to(wide)
    if torch.equal(found, wanted):  # the rest takes several times the tensors' memory
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
    """Run samples forward and backward through a model, and inspect each intermediate result.

    Returns:
        Results of ``look`` by name: for the outputs of modules, in order, then for the model's
        output and the gradients of weights (None if there is none). For a module that is called
        several
        times, the last one.
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
        if name and not isinstance(module, torch.jit.ScriptModule)  # weights without gradients
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
    """Project the rows of a gradient to a few random vectors; all gradients would fill memory."""
    if gradient.dim() < 2:
        return gradient
    rows, drawn = gradient.flatten(1), torch.Generator().manual_seed(0)
    return rows @ torch.randn(rows.shape[1], DIRECTIONS, generator=drawn).to(rows)


def generators() -> tuple[Any, ...]:
    """Read the states of the global generators of torch, Python and numpy."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def drew(before: tuple[Any, ...]) -> bool:
    """Check whether one of the `generators` has advanced."""
    now = generators()
    moved_on = not torch.equal(before[0], now[0]) or before[1] != now[1]
    return moved_on or not all(map(np.array_equal, before[2], now[2]))


@contextmanager
def restored_generators() -> Iterator[None]:
    """Restore the generators of torch, Python and numpy at the end."""
    states = generators()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def refuse_outputs(model: nn.Module, samples: Samples, classes: int, loss: str) -> None:
    """Reject a model whose outputs do not fit the targets, before torch fails on an index or shape.

    Args:
        model: Not modified.
        samples: One or more.
        classes: Number of classes of the targets, if the loss has classes.
        loss: A key of `fedraclora.data.task.LOSSES`; others pass.

    Raises:
        DataError: Naming the model's outputs, the targets and what to do.
        ModelError: If it cannot be called.
    """
    first = samples.take(torch.zeros(1, dtype=torch.int64, device=samples.target.device))
    with restored_generators(), torch.no_grad():
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
