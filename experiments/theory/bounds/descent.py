"""What theorems are told, and the descent inequality that they give."""

from __future__ import annotations

from dataclasses import dataclass

from fedraclora.errors import ConfigError

ROUNDING = 1e-9  # a step of 1 / L, computed, may be larger than 1 / L by rounding


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
        if self.pl is not None and not 0 < self.pl <= self.smoothness * (1 + ROUNDING):
            raise ConfigError(f"pl is {self.pl}; it must lie in (0, smoothness={self.smoothness}]")
        for key in ("gap", "sigma_sq", "zeta_sq"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"{key} is {getattr(self, key)}; 0 or more is wanted")
        if not 0 <= self.lambda_min <= self.lambda_max <= 1 + ROUNDING:
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
        source: The paper, or "derived here" with its section in docs/theory.md.
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
