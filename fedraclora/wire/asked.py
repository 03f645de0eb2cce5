"""Checks of a received request, beyond its types."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from fedraclora.errors import WireError
from fedraclora.protocol.coding import NONE, ZSTD
from fedraclora.protocol.cohorts import WEIGHTINGS
from fedraclora.protocol.factor import Factor
from fedraclora.protocol.method import RoundInstructions
from fedraclora.protocol.quantized import FULL, ROUNDED
from fedraclora.sketch import SketchSpec
from fedraclora.wire.exchange import TrainRequest
from fedraclora.wire.fields import finite_number, shape_of, shown, whole_number

WEIGHTS = (None, *WEIGHTINGS)
WHEN = (None, "before", "after")


def check_kind(value: object, what: str) -> str:
    """Check the number format of messages.

    Raises:
        WireError: If it is unknown.
    """
    if value not in (FULL, *ROUNDED):
        raise WireError(f"{what} is {shown(value)}, expected one of {(FULL, *ROUNDED)}")
    return str(value)


def check_request(request: TrainRequest) -> TrainRequest:
    """Check a received training request, beyond its types.

    Raises:
        WireError: Naming the field, its value and what was expected.
    """
    clients, places = request.clients, request.places
    if not len(clients) or (clients < 0).any() or (clients.diff() <= 0).any():
        raise WireError(
            f"a message is for the clients {shown(clients.tolist())}, "
            "expected ids from 0 on in ascending order"
        )
    if places is not None and not (
        len(places) == len(clients) and places[0] == request.first and (places.diff() > 0).all()
    ):
        raise WireError(
            f"the places of {len(clients)} clients in the cohort are {shown(places.tolist())}, "
            f"expected one for each, from {request.first} on in ascending order"
        )
    for name, value, wanted in (
        ("reduce", request.reduce, WEIGHTS),
        ("measure", request.measure, WHEN),
        ("coding", request.coding, (NONE, ZSTD)),
    ):
        if value not in wanted:
            raise WireError(f"{name} is {shown(value)}, expected one of {wanted}")
    if request.clip is not None and not finite_number(request.clip, "clip") > 0:
        raise WireError(f"clip is {shown(request.clip)}, expected a positive number")
    check_kind(request.uplink, "uplink")
    whole_number(request.round_, "its round")
    whole_number(request.version, "its version")
    return request


def ranks_of(ranks: torch.Tensor, clients: int) -> torch.Tensor:
    """Read the rank budgets of the clients of a message (`rank_budgets.spans`).

    Raises:
        WireError: If they are invalid.
    """
    if len(ranks) == clients and (ranks > 0).all():
        return ranks
    pairs = ranks.reshape(-1, 2) if len(ranks) == 2 * clients else ranks.new_zeros(1, 2)
    if not ((pairs[:, 0] >= 0) & (pairs[:, 0] < pairs[:, 1])).all():
        raise WireError(
            f"the rank budgets of {clients} clients are {shown(ranks.tolist())}, "
            "expected for each a number from 1 on, or the first component and the one after the "
            "last"
        )
    return pairs


def check_instructions(downlink: RoundInstructions, own: Collection[str]) -> None:
    """Check a received downlink, beyond its types; ``own``: tensors with one value per client.

    Raises:
        WireError: Naming the field, its value and what was expected.
    """
    _check(downlink)
    for key, each in downlink.named.items():
        _check_factor(key, each, key in own)
        if key in downlink.dense and not each.trained:
            raise WireError(f"{key} is frozen; of no adapter, only what is trained is sent")


def _check(downlink: RoundInstructions) -> None:
    """Reject instructions whose fields contradict each other."""
    whole_number(downlink.link, "its link")
    downlink.program.check(downlink)
    slots = downlink.trained()
    for extra, tree in downlink.extras.items():
        for name, value in tree.items():
            if name not in slots or tuple(value.shape) != slots[name].shape:
                raise WireError(
                    f"the extra {extra} of a message names {name}, but no tensor of that name and "
                    "shape is trained"
                )


def _check_sketch(first: SketchSpec, count: int, what: str) -> None:
    whole_number(first.seed, f"the seed of {what}")
    whole_number(count, f"the number of parts of {what}", 1, max(1, first.dim // first.rank))


def _check_factor(key: str, factor: Factor, own: bool) -> None:
    """Reject a factor or tensor whose fields contradict each other.

    Args:
        key: Its name.
        factor: As it was read.
        own: Whether each client has its own numbers.
    """
    numbers, drawing, C = factor.numbers, factor.sketch, factor.coefficients
    shape = shape_of([*factor.shape], f"the shape of {key}")
    said = (numbers is not None) + (drawing is not None)
    if said > 1 or (not said and not factor.trained) or (C is not None and drawing is None):
        raise WireError(f"{key} is to be numbers, a drawing or trained from zero, one of these")
    if drawing is not None:
        _check_sketch(drawing, factor.count, key)
    if C is not None and drawing is not None:
        if C.dtype != torch.float64 or C.dim() != 2:
            raise WireError(f"the coefficients of {key} are no matrix of float64")
        if not len(C) <= drawing.dim or C.shape[1] <= drawing.rank:
            raise WireError(
                f"the coefficients of {key} have the shape {tuple(C.shape)}, "
                f"expected a row for each component, and more columns than the {drawing.rank} of "
                "its drawing"
            )
    inferred = replace(factor, trained=False, shape=())
    found = inferred.shape if numbers is None else tuple(numbers.shape[own:])
    if (said and found != shape) or (not factor.trained and len(shape) != 2):
        raise WireError(f"{key} is to be of the shape {shape}, but came in the shape {found}")
