"""Check the values that a method returns for one matrix; torch's errors would not name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from fedraclora.data.own_loss import PASSING
from fedraclora.errors import ConfigError, DivergenceError
from fedraclora.imports import as_user_error
from fedraclora.protocol.factor import LABELS, Factor, FactorLike
from fedraclora.schema import of_project
from fedraclora.strategies.shared.layer import (
    Factors,
    Layer,
    LayerUpdate,
    Replies,
    RoundContext,
    known,
)


class LayerHookChecks(Protocol):
    """Define a method's hooks for one matrix."""

    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        """Return the factors for clients."""

    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        """Return the result of a round."""


def factors_of(method: LayerHookChecks, layer: Layer, now: RoundContext) -> dict[str, Factor]:
    """Return a method's factors for a matrix, in the order of the product.

    Raises:
        ConfigError: Naming the method, the layer, and the found and the expected value.
        DivergenceError: The same, if numbers of a user's method are not finite.
    """
    with _calling(method, "factors", layer):
        found: object = method.factors(layer, now)
    checks = _ReturnCheck(method, f"factors of {type(method).__name__} returns for {layer.name}")
    if not (factors := checks.labelled("", found)):
        raise ConfigError(f"{checks.text} no factor; {LABELLED}")
    _check_product(checks.text, [*factors.values()], layer)
    return factors


def update_of(method: LayerHookChecks, layer: Layer, replies: Replies) -> LayerUpdate:
    """Return a method's update for a matrix.

    Raises:
        ConfigError: As `factors_of`.
        DivergenceError: As `factors_of`.
    """
    with _calling(method, "update", layer):
        update: object = method.update(layer, replies)
    checks = _ReturnCheck(
        method, f"update of {type(method).__name__} returns for {layer.name}", clients=False
    )
    if not isinstance(update, LayerUpdate):
        raise ConfigError(f"{checks.text} a {type(update).__name__}, expected a LayerUpdate")
    carried = checks.labelled("carried ", update.carried)
    ends = {"B": (0, layer.m), "A": (1, layer.n)}
    for label, (axis, length) in ends.items():
        if label in carried and carried[label].shape[axis] != length:
            raise ConfigError(
                f"{checks.text} carried {label} of the shape {carried[label].shape}, expected "
                f"{layer.m} rows of B and {layer.n} columns of A"
            )
    for name, factors in (("merged", update.merged), ("aggregate", update.aggregate)):
        if factors is None:
            continue
        if not isinstance(factors, tuple | list):
            raise ConfigError(
                f"{checks.text} {name}={type(factors).__name__}, expected a tuple of "
                "matrices (B, A)"
            )
        product = [checks.matrix(f"{name} {k}", factor) for k, factor in enumerate(factors)]
        _check_product(f"{checks.text} {name}", product, layer)
    if update.keep not in {None, "B", "A"}:
        raise ConfigError(f"{checks.text} keep={update.keep!r}, expected B, A or None")
    return update


def kept_place(update: LayerUpdate, layer: Layer) -> int | None:
    """Return the position, in the merged product, of the factor that stays beside the weight."""
    if update.keep is None:
        return None
    merged = update.merged or ()
    place = {"B": 0, "A": len(merged) - 1}[known(update.keep, "BA")]
    if len(merged) > 1 and Factor.of(merged[place]).numbers is not None:
        return place
    what = "no matrix" if len(merged) > 1 else "not a factor of a product"
    raise ConfigError(
        f"LayerUpdate(keep={update.keep!r}) of {layer.name}: the merged factor {update.keep} "
        f"is {what}, but only a matrix that clients trained can be kept as layer.past. Keep "
        "the trained factor, and draw a random one again by now.sketch with the same index"
    )


LABELLED = (
    'expected a dict of factors by label, such as {"B": layer.trained("B"), '
    '"A": now.sketch(layer, "A", "gaussian")}'
)


def _calling(method: LayerHookChecks, hook: str, layer: Layer) -> AbstractContextManager[None]:
    """Name a user's method in its errors; errors of the project's methods pass unchanged."""
    if of_project(type(method)):
        return nullcontext()
    name = f"{type(method).__name__}, {layer.name}: "
    return as_user_error(ConfigError, name, f"calling its {hook}", passing=PASSING)


@dataclass(frozen=True)
class _ReturnCheck:
    """Check the values that a method returns for a matrix.

    Attributes:
        method: The method.
        text: The start of messages.
        clients: Whether numbers may have a client axis.
    """

    method: LayerHookChecks
    text: str
    clients: bool = True

    def labelled(self, what: str, given: object) -> dict[str, Factor]:
        """Check factors by label, and put them into the order of their product."""
        if not isinstance(given, Mapping):
            raise ConfigError(f"{self.text} {what}a {type(given).__name__}; {LABELLED}")
        if odd := [label for label in given if label not in LABELS]:
            raise ConfigError(
                f"{self.text} {what}the factor {odd[0]!r}, expected {', '.join(LABELS)}, the "
                "factors of a product in this order"
            )
        return {
            label: self.matrix(f"{what}{label}", given[label]) for label in LABELS if label in given
        }

    def matrix(self, what: str, given: object) -> Factor:
        """Convert a factor; refuse one that is no matrix of finite floating-point numbers."""
        name, expected = f"{self.text} {what}", "expected a matrix of floating-point numbers"
        if not isinstance(given, FactorLike):
            raise ConfigError(
                f"{name} as a {type(given).__name__}, expected a tensor, a random factor "
                "(now.sketch) or a trained one (layer.trained)"
            )
        factor = Factor.of(given)
        numbers, shape = factor.numbers, factor.shape
        if len(shape) != 2 or min(shape) < 0 or (factor.per_client and not self.clients):
            got = shape if numbers is None else numbers.shape
            raise ConfigError(f"{name} with the shape {[*got]}; {expected}")
        if numbers is None:
            return factor
        if numbers.layout != torch.strided or numbers.is_meta or not numbers.is_floating_point():
            kind = "without numbers (meta)" if numbers.is_meta else f"{numbers.dtype}"
            raise ConfigError(
                f"{name} as {kind}, {numbers.layout}; {expected}, as replies.mean(label) gives"
            )
        if tuple(numbers.shape[-2:]) != shape:
            raise ConfigError(
                f"{name} to be trained with the shape {[*shape]}, from a start of the shape "
                f"{[*numbers.shape]}"
            )
        if not of_project(type(self.method)) and not bool(numbers.isfinite().all()):
            raise DivergenceError(f"{name} with NaN or infinity, expected finite numbers")
        return factor


def _check_product(said: str, factors: Sequence[Factor], layer: Layer) -> None:
    """Reject factors whose product does not have the shape of the matrix."""
    shapes = [factor.shape for factor in factors]
    ends = (shapes[0][0], shapes[-1][-1]) if shapes else layer.shape
    if ends != layer.shape or any(one[-1] != other[0] for one, other in pairwise(shapes)):
        raise ConfigError(
            f"{said} factors of the shapes {', '.join(map(str, shapes))}, expected those of a "
            f"product of {layer.m} rows and {layer.n} columns, (B, A)"
        )
