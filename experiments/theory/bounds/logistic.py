"""A constant of the Polyak-Lojasiewicz inequality for the logistic loss."""

from __future__ import annotations

from math import exp

from fedraclora.errors import ConfigError


def logistic_pl(curvature: float, norm: float, gap: float) -> float:
    """Bound from below the PL constant of the mean logistic loss where ``f - f* <= gap``.

    Along any ray from the minimiser the loss h obeys ``|h'''| <= norm h''`` (generalised
    self-concordance), which bounds both the length x / norm of the ray inside the sublevel set and
    the PL ratio on it, ``curvature (1 - e^-x)^2 / (2 (x + e^-x - 1))``. Projected gradient descent
    with a step of at most 1 / L never leaves the sublevel set of its start; SGD and local steps
    may, and then the constant is of no use.

    Source: derived here (docs/theory.md, section 6) from Bach, *Self-concordant analysis for
    logistic regression*, EJS 2010, arXiv 0910.4627.

    Args:
        curvature: Least eigenvalue of the Hessian at the minimiser.
        norm: Greatest norm of a sample.
        gap: Of the sublevel set, positive.

    Returns:
        mu. It tends to ``curvature`` for a small gap.

    Example:
        >>> round(logistic_pl(0.2, norm=1.0, gap=1e-9), 4), round(logistic_pl(0.2, 3.0, 0.1), 4)
        (0.2, 0.022)
    """
    if not (curvature > 0 and norm > 0 and gap > 0):
        raise ConfigError(f"{curvature=}, {norm=} and {gap=} must be positive")
    target = gap * norm**2 / curvature

    def rise(x: float) -> float:
        # The series where the difference would cancel.
        return x**2 / 2 * (1 - x / 3) if x < 1e-4 else x + exp(-x) - 1

    low, high = 0.0, target + 1  # rise(x) >= x - 1
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if rise(middle) >= target else (middle, high)
    return curvature * (1 - exp(-high)) ** 2 / (2 * rise(high))
