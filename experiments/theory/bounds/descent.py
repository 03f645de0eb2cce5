"""What theorems are told, and the descent inequality that they give."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

from fedraclora.errors import ConfigError

STEP_ROUNDING = 1e-9  # a step of 1 / L, computed, may be larger than 1 / L by rounding


@dataclass(frozen=True)
class Given:
    """What a theorem is told of the problem, the path and the sketches.

    Attributes:
        smoothness: L: the gradient of f is L-Lipschitz in the Frobenius norm. Where clients take
            local steps: the gradient of every batch's loss is.
        gap: Delta, f(W^0) - f*.
        pl: mu of the Polyak-Lojasiewicz inequality at the iterates, or None where it is not known.
        sigma_sq: Bound on the expected squared deviation of a stochastic gradient from its mean:
            of the minibatch's from f's (SGD), or of a client's batches of one epoch from the
            client's own, averaged over clients (local steps).
        zeta_sq: Bound on the mean over clients of ``||grad f_m - grad f||^2``.
        lambda_min: Least eigenvalue of E[H].
        lambda_max: Greatest eigenvalue of E[H]; beside kept rows of a length of their own see
            `beside_kept`.
        curvature: Least eigenvalue of the Hessian of f, where f is twice differentiable and it is
            known; `cover` alone asks for it. None: -L, which is true of any f.

    Raises:
        ConfigError: If a constant is out of range.
    """

    smoothness: float
    gap: float
    pl: float | None = None
    sigma_sq: float = 0.0
    zeta_sq: float = 0.0
    lambda_min: float = 1.0
    lambda_max: float = 1.0
    curvature: float | None = None

    def __post_init__(self) -> None:
        """Reject constants that no problem has."""
        if not self.smoothness > 0:
            raise ConfigError(f"smoothness is {self.smoothness}; a positive number is wanted")
        if self.pl is not None and not 0 < self.pl <= self.smoothness * (1 + STEP_ROUNDING):
            raise ConfigError(f"pl is {self.pl}; it must lie in (0, smoothness={self.smoothness}]")
        for key in ("gap", "sigma_sq", "zeta_sq"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"{key} is {getattr(self, key)}; 0 or more is wanted")
        if not 0 <= self.lambda_min <= self.lambda_max <= 1 + STEP_ROUNDING:
            raise ConfigError(
                f"lambda_min is {self.lambda_min} and lambda_max is {self.lambda_max}; as "
                "eigenvalues of E[H] they must lie in [0, 1], and in this order"
            )


@dataclass(frozen=True)
class Descent:
    """The constants of (*), and what follows from them.

    Attributes:
        progress: Decrease of E f per unit of squared gradient norm, in a round; in a cover or a
            link of several rounds where the theorem takes those as one.
        error: What noise and drift add to E f, likewise.
        given: What the theorem was told.
        source: The paper, or "derived here" with its section in docs/records/theory.md.
    """

    progress: float
    error: float
    given: Given
    source: str

    def gradient(self, rounds: int) -> float:
        """Bound (1/T) sum_{t<T} E ||grad f(W^t)||^2 for T = ``rounds``, 1 or more."""
        return (self.given.gap / rounds + self.error) / self.progress

    def loss_gap(self, rounds: int) -> float:
        """Bound E f(W^T) - f* for T = ``rounds``, 0 or more, under the PL inequality.

        Raises:
            ConfigError: If no PL constant is known.
        """
        left = self.contraction**rounds
        return left * self.given.gap + (1 - left) * self.floor

    @property
    def contraction(self) -> float:
        """q, the factor that a round leaves of the gap, in [0, 1)."""
        if self.given.pl is None:
            raise ConfigError(
                "no PL constant is known, so the gap has no bound; use the bound on the gradient"
            )
        return max(0.0, 1 - 2 * self.given.pl * self.progress)

    @property
    def floor(self) -> float:
        """What the bound of the gap falls to: error / (1 - q)."""
        return self.error / (1 - self.contraction)


def logistic_pl(curvature: float, norm: float, gap: float) -> float:
    """Bound from below the PL constant of the mean logistic loss where ``f - f* <= gap``.

    Along any ray from the minimiser the loss h obeys ``|h'''| <= norm h''`` (generalised
    self-concordance), which bounds both the length x / norm of the ray inside the sublevel set and
    the PL ratio on it, ``curvature (1 - e^-x)^2 / (2 (x + e^-x - 1))``. Projected gradient descent
    with a step of at most 1 / L never leaves the sublevel set of its start; SGD and local steps
    may, and then the constant is of no use.

    Source: derived here (docs/records/theory.md, section 6) from Bach, *Self-concordant analysis
    for logistic regression*, EJS 2010, arXiv 0910.4627.

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
