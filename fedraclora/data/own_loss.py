"""Call the user's loss: a function or a torch module with two tensor arguments.

A loss returns [N], one loss per sample, or a loss for each number of the target. A pair is the loss
of each sample, summed over its parts, and its number of parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedraclora.binding import object_of
from fedraclora.errors import ConfigError, FedRacLoraError
from fedraclora.imports import as_user_error
from fedraclora.object_registry import is_named

# For each sample, [N]: its loss, summed over its parts, and its number of parts.
Losses = tuple[torch.Tensor, torch.Tensor]
IGNORED_TOKEN = -100  # target of a token or pixel without a loss, as in torch's cross_entropy
PASSING = (FedRacLoraError, MemoryError, torch.OutOfMemoryError)  # raised unchanged
WANTED = (
    "loss(output, target) must return N losses, one for each sample (reduction='none' in "
    "torch's losses), or a pair of tensors: each sample's loss summed over its parts, and its "
    "number of parts"
)


def named_loss(value: object) -> str:
    """Return a config's loss as one name, with its parameters behind it.

    Example:
        >>> named_loss({"name": "mine:focal", "gamma": 2.0})
        'mine:focal {"gamma": 2.0}'
    """
    if not isinstance(value, Mapping):
        return str(value)
    rest = {key: each for key, each in value.items() if key != "name"}
    return f"{value.get('name')} {json.dumps(rest)}" if rest else str(value.get("name"))


def own_object(key: str, name: str) -> Any:
    """Return the object with a name from `named_loss`.

    Raises:
        ConfigError: If there is none, or it does not take the parameters.
    """
    name, _, rest = name.partition(" ")
    return object_of(key, {"name": name} | (json.loads(rest) if rest else {}))


def short_name(name: str) -> str:
    """Shorten a name for ledgers and reports.

    Example:
        >>> short_name('mine:focal {"gamma": 2.0}'), short_name("Lost.recall@0123456789abcdef")
        ('focal', 'recall')
    """
    name = name.partition(" ")[0].rpartition(":")[2].partition("@")[0]
    return name.rpartition(".")[2]


def is_own(name: str) -> bool:
    """Return whether a name is that of a user's object."""
    return is_named(name.partition(" ")[0])


@dataclass(frozen=True)
class OwnLoss:
    """A user's loss, in the form that the engines need.

    Attributes:
        name: Its name, for messages.
        function: The user's function.
    """

    name: str
    function: Callable[..., object]

    @classmethod
    def of(cls, name: str) -> OwnLoss:
        """Find a loss by its name.

        Raises:
            ConfigError: If there is none.
        """
        return cls(name.partition("@")[0], own_object("data.loss", name))

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> Losses:
        """Call the loss, and return each sample's loss and number of parts."""
        return self.read(self.call(output, target), output, target)

    def call(self, output: torch.Tensor, target: torch.Tensor) -> Any:
        """Call the user's function."""
        # class weights must be on the device of the outputs
        if isinstance(self.function, nn.Module):
            self.function.to(output.device, output.dtype)
        by_number = output.numel() == target.numel()
        if by_number and type(self.function).__module__ == "torch.nn.modules.loss":
            # These would broadcast [N, 1] with [N] to [N, N], and reject integers.
            output, target = output.reshape(target.shape), target.to(output.dtype)
        return self.function(output, target)

    def read(self, found: Any, output: torch.Tensor, target: torch.Tensor) -> Losses:
        """Check and convert the returned value.

        Raises:
            ConfigError: If it is not one loss for each sample.
        """
        if _is_tensor(found) and not found.dim():  # the mean of a batch, in a user's own loop
            found = found.expand(len(target))
        pair = found if isinstance(found, tuple | list) else (found,)
        count, shapes = len(target), [tuple(each.shape) for each in pair if _is_tensor(each)]
        problem = f"tensors of shape {', '.join(map(str, shapes))}" if shapes else "no tensor"
        if len(shapes) == len(pair) == 1 and shapes[0] in {(count,), (count, 1), target.shape}:
            counted = torch.ones_like(pair[0], dtype=torch.int64)
            if shapes[0] == target.shape and not target.is_floating_point():
                counted *= target != IGNORED_TOKEN
            both = (each.reshape(count, -1).sum(dim=1) for each in (pair[0], counted))
            return next(both), next(both)
        if len(pair) != 2 or shapes != [(count,)] * 2:
            if shapes == [(count, count)]:
                problem += f" (an output of {tuple(output.shape)} beside a target of "
                problem += f"{tuple(target.shape)} was spread out: reshape one of them)"
            raise ConfigError(
                f"data.loss={self.name} gives {problem} for {count} samples; {WANTED}"
            )
        return pair[0], pair[1]


def _is_tensor(found: object) -> bool:
    return isinstance(found, torch.Tensor)


def check_loss(
    loss: OwnLoss, output: torch.Tensor, target: torch.Tensor, *, scalar: bool = False
) -> None:
    """Call a loss on a few samples, and reject it if it cannot be trained.

    Args:
        loss: The user's loss.
        output: The model's outputs for a few samples, one of them twice.
        target: Their targets.
        scalar: Whether it may return the mean of a batch.

    Raises:
        ConfigError: Naming the loss, and the found and expected result.
    """
    name = f"loss {loss.name}"
    if isinstance(loss.function, nn.Module) and any(
        each.requires_grad for each in loss.function.parameters()
    ):
        raise ConfigError(
            f"{name} has weights of its own, which would not be trained: keep them in the model"
        )
    wanted, slope, is_scalar = _called(loss, output, target)
    if is_scalar and not scalar:
        raise ConfigError(f"{name} gives a scalar for {len(target)} samples; {WANTED}")
    if not bool(torch.isfinite(wanted).all()):
        row = int((~torch.isfinite(wanted)).nonzero()[0])
        raise ConfigError(
            f"{name} gives {float(wanted[row])} for an output {output[row].tolist()} and a "
            f"target {target[row].tolist()}, but losses must be finite: keep logarithms, roots "
            "and quotients away from 0"
        )
    if slope is not None and not bool(slope.any()):  # a hinge loss has a gradient of zero in places
        drawn = torch.Generator().manual_seed(0)
        other = 3 * torch.randn(output.shape, generator=drawn, dtype=torch.float64)
        slope = _called(loss, other.to(output), target)[1]
        slope = slope if slope is not None and bool(slope.any()) else None
    if slope is None or not bool(torch.isfinite(slope).all()):
        problem = "no gradient" if slope is None else "a gradient with a NaN or an infinity"
        raise ConfigError(
            f"{name} gives the model {problem}. Compute it from the output with differentiable "
            "torch functions only (no argmax, round, detach, item or numpy)."
        )
    if not torch.equal(_called(loss, output, target)[0], wanted):
        raise ConfigError(
            f"{name} returns something else when it is called twice with the same output and "
            "target. It must use no random numbers and keep no state between calls."
        )
    if is_scalar:
        return
    rows = range(len(target))
    each = torch.cat([_called(loss, output[i : i + 1], target[i : i + 1])[0] for i in rows])
    if not torch.allclose(each.double(), wanted.double(), 1e-3, 1e-3 * float(wanted.abs().max())):
        raise ConfigError(
            f"{name}: the loss of a sample depends on the other samples of its batch (through a "
            "mean or weights over the batch, for example), so it would depend on the engine and "
            "on other clients. Compute each sample's loss from its own output and target."
        )


def _called(
    loss: OwnLoss, output: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """Return each sample's mean loss, the output's gradient or None, and if it is a scalar."""
    leaf, beside = output.detach().clone().requires_grad_(), target.clone()
    of = " and ".join(
        f"{name} {tuple(t.shape)} of {str(t.dtype).removeprefix('torch.')} on {t.device}"
        for name, t in (("output", output), ("target", target))
    )
    context = (f"loss {loss.name}: ", f"calling it with {of}", f". {WANTED}", PASSING)
    with as_user_error(ConfigError, *context), torch.enable_grad():
        given = leaf * 1.0  # the loss may write into it, which we detect
        found = loss.call(given, beside)
        losses, parts = loss.read(found, given, beside)
        slope = None
        if losses.requires_grad:
            [slope] = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
    if not (torch.equal(given, leaf) and torch.equal(beside, target)):
        raise ConfigError(
            f"loss {loss.name} changes its output or target in place: use x * 2 instead of "
            "x.mul_(2)"
        )
    if not bool((torch.isfinite(parts) & (parts >= 0)).all()):
        raise ConfigError(
            f"loss {loss.name} gives {parts.tolist()} as the numbers of parts, but they must be "
            "counts, 0 or more"
        )
    return losses.detach() / parts.clamp(min=1), slope, _is_tensor(found) and not found.dim()
