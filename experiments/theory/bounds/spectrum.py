"""Extreme eigenvalues of E[H] over the layers of a round."""

from __future__ import annotations

from collections.abc import Iterable

from fedraclora.errors import ConfigError
from fedraclora.protocol.downlink import Downlink
from fedraclora.sketch import SKETCHES, Constants, SketchSpec, constants


def over_layers(specs: Iterable[SketchSpec], *, dense: bool = False) -> Constants:
    """Combine the extreme eigenvalues of E[H] over layers: the least and the greatest of theirs.

    H is block diagonal over the layers, so it stays a projection and everything holds with these
    (derived here). A constant rank on layers of unequal width makes ``lambda_max / lambda_min``
    exceed 1, and the bounds' floors grow by that factor; a rank written as a fraction does not.

    Args:
        specs: One sketch for each sketched layer.
        dense: Whether further layers are trained in full, with eigenvalue 1.

    Returns:
        The constants.

    Raises:
        ConfigError: If nothing is trained.

    Example:
        >>> wide = SketchSpec("orthonormal", "right", rank=2, dim=16, seed=0, index=0)
        >>> over_layers([wide, SketchSpec("gaussian", "left", rank=2, dim=4, seed=0, index=0)])
        Constants(lambda_min=0.125, lambda_max=0.5)
    """
    found = [constants(spec) for spec in specs] + [Constants(1.0, 1.0)] * dense
    if not found:
        raise ConfigError("no layer is trained, so there is no E[H]; give at least one sketch")
    return Constants(min(c.lambda_min for c in found), max(c.lambda_max for c in found))


def beside_kept(
    rank: int, kept: int, dim: int, length: float = 1.0, *, local: bool = False
) -> Constants:
    """Compute the constants of a link k of whose rows are known from the past, given that past.

    With orthonormal kept rows K of length c, and fresh ones uniform in their complement, a step is
    ``W - gamma D g`` with ``D = c^2 K^T K + F^T F <= I``. Progress needs the least eigenvalue of
    E[D]; noise needs the greatest of E[D^2], and under local steps that of E[D]
    (docs/records/theory.md, section 9):

        E[D] = c^2 K^T K + (r - k) / (d - k) (I - K^T K),    E[D^2] likewise with c^4

    Args:
        rank: r.
        kept: k, at most r.
        dim: d, at least r.
        length: c.
        local: Whether clients take several steps of a round.

    Example:
        >>> beside_kept(rank=4, kept=2, dim=12)
        Constants(lambda_min=0.2, lambda_max=1.0)
    """
    share = (rank - kept) / (dim - kept) if dim > kept else 1.0
    if not kept:
        return Constants(share, share)
    return Constants(min(length**2, share), max(length ** (2 if local else 4), share))


def paired(rank: int, dim: int) -> Constants:
    """Compute the constants of links in pairs: one drawn, the next on the range of the last change.

    The second of a pair makes no progress that is proved, and takes in all noise (lambda_max 1).
    Together they have the progress of one and the noise of both (docs/records/theory.md, section
    9); these are the means over both. A curve above its floor of noise stays below what one bound
    with the means says: of two rounds with progress x and none, ``1 - x <= (1 - x/2)^2``.

    Args:
        rank: r.
        dim: d, of the drawn rows.

    Example:
        >>> paired(rank=4, dim=16)
        Constants(lambda_min=0.125, lambda_max=0.625)
    """
    share = rank / dim
    return Constants(share / 2, (share + 1) / 2)


def of_downlink(downlink: Downlink) -> Constants:
    """Compute the extreme eigenvalues of E[H] of a round from what the cohort is sent.

    Args:
        downlink: Of a method that draws its sketches anew in each round.

    Returns:
        The constants over its layers; 1 for tensors that are trained in full.

    Where groups train parts of one drawing these are the constants of the whole drawing.

    Raises:
        ConfigError: If an adapter is not one sketched and one trained factor, or clients have
            rank budgets: the step is then no projected gradient step.
    """
    parts = downlink.ranks is not None and downlink.ranks.dim() == 2
    if downlink.ranks is not None and not parts:
        raise ConfigError("clients have rank budgets, which no theorem here covers; leave them out")
    specs = []
    for name, adapter in downlink.adapters.items():
        drawn = [spec for f in adapter.factors.values() if (spec := f.drawing)]
        if len(drawn) != 1 or len(adapter.factors) != 2:
            raise ConfigError(
                f"the adapter of {name} has the factors {sorted(adapter.factors)}, of which "
                f"{len(drawn)} are sketched; the theorems need one sketched and one trained"
            )
        if parts and SKETCHES[drawn[0].kind].basis is None:
            raise ConfigError(
                f"{name} has several {drawn[0].kind!r} sketches, which are not orthogonal to one "
                "another; the theorems need a kind with orthonormal rows"
            )
        specs += drawn
    return over_layers(specs, dense=bool(downlink.dense))
