r"""Convergence bounds of chains of random projections, as functions of named constants.

A round with sketches H (block diagonal over layers, ``H = H^2 = H^T``), drawn anew and
independently of the past, moves the weights by ``-step H g``; where a part of H is known from the
past, all holds given that past (`cases.beside_kept`). Every theorem here is one inequality, with
f the objective and t the round,

    E f(W^{t+1}) <= E f(W^t) - progress E ||grad f(W^t)||^2 + error,                       (*)

and its two consequences, for T rounds and Delta = f(W^0) - f*:

    (1/T) sum_{t<T} E ||grad f(W^t)||^2 <= Delta / (progress T) + error / progress
    E f(W^T) - f* <= q^T Delta + (1 - q^T) error / (1 - q),   q = 1 - 2 mu progress

The second needs the Polyak-Lojasiewicz inequality ``||grad f||^2 >= 2 mu (f - f*)`` at every
iterate: put into (*) it gives ``e_{t+1} <= q e_t + error``. `Descent` holds (progress, error), and
each theorem is a function that gives one.

What is the paper's (Malinovsky et al., arXiv 2410.08305) and what was derived here is said by each
function; all proofs are in docs/records/theory.md. None covers momentum, adaptive steps, several
local epochs, clients of unequal weight or number of steps, or rank budgets. Where a sketch lives
for several rounds, (*) is about its whole link.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt

from fedraclora.errors import ConfigError
from fedraclora.protocol.quantized import FULL, ROUNDINGS

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
            raise ConfigError(f"smoothness={self.smoothness}: expected a positive number")
        if self.pl is not None and not 0 < self.pl <= self.smoothness * (1 + STEP_ROUNDING):
            raise ConfigError(f"pl is {self.pl}; it must lie in (0, smoothness={self.smoothness}]")
        for key in ("gap", "sigma_sq", "zeta_sq"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"{key}={getattr(self, key)}: expected 0 or more")
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

    Along any ray from the minimizer the loss h obeys ``|h'''| <= norm h''`` (generalized
    self-concordance), which bounds both the length x / norm of the ray inside the sublevel set and
    the PL ratio on it, ``curvature (1 - e^-x)^2 / (2 (x + e^-x - 1))``. Projected gradient descent
    with a step of at most 1 / L never leaves the sublevel set of its start; SGD and local steps
    may, and then the constant is of no use.

    Source: derived here (docs/records/theory.md, section 6) from Bach, *Self-concordant analysis
    for logistic regression*, EJS 2010, arXiv 0910.4627.

    Args:
        curvature: Least eigenvalue of the Hessian at the minimizer.
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


def rounding(uplink: str, downlink: str) -> float:
    """Compute q: a change that is rounded on its way up and down has a mean square up to 1 + q.

    Source: derived here (docs/records/theory.md, section 3).

    Args:
        uplink: How numbers go up, `fedraclora.protocol.quantized`.
        downlink: How they go down.

    Example:
        >>> round(rounding("int8", "float32"), 5)
        0.00198
    """
    added = {FULL: 0.0} | {name: kind.added for name, kind in ROUNDINGS.items()}
    return (1 + added[uplink]) * (1 + added[downlink]) - 1


def gd(given: Given, step: float, q: float = 0.0) -> Descent:
    """Bound projected gradient descent, ``W <- W - step H grad f(W)``.

    Source: Theorems 5.3 (non-convex) and 5.5 (PL) of arXiv 2410.08305, as secondary sources quote
    them; the proof is written anew in docs/records/theory.md, section 2, and asks for step <= 1 /
    L. For ``f = L/2 ||W||^2``, step 1 / L and an isotropic sketch, 1 - r/n is exact.

    Args:
        given: L, gap, mu, lambda_min. The noise is ignored: there is none.
        step: gamma, in weight space.
        q: Of `rounding`.

    Raises:
        ConfigError: If the step is above 1 / ((1 + q) L), or lambda_min is 0.
    """
    _check(given, step, 1 / ((1 + q) * given.smoothness))
    source = "arXiv 2410.08305, Theorems 5.3 and 5.5"
    return Descent(step * given.lambda_min / 2, 0.0, given, source)


def sgd(given: Given, step: float, q: float = 0.0) -> Descent:
    """Bound ``W <- W - step H g`` with an unbiased g whose noise is independent of H.

    Source: derived here (docs/records/theory.md, section 3); the paper has an SGD theorem, whose
    constants were not available.

    Args:
        given: L, gap, mu, sigma_sq, lambda_min, lambda_max.
        step: gamma, in weight space.
        q: Of `rounding`.

    Raises:
        ConfigError: If the step is above 1 / ((1 + q) L), or lambda_min is 0.
    """
    smoothness = (1 + q) * given.smoothness
    _check(given, step, 1 / smoothness)
    error = smoothness * step**2 * given.lambda_max * given.sigma_sq / 2
    return Descent(step * given.lambda_min / 2, error, given, "derived here, section 3")


def gd_link(given: Given, step: float, rounds: int) -> Descent:
    """Bound a link of several rounds of gradient descent under one sketch, taken as one round.

    For ``f = L/2 ||W||^2`` and an isotropic sketch it is the expectation. At step 1 / L it is `gd`:
    then no round but the first is certain to go on. Source: derived here (docs/records/theory.md,
    section 10).

    Args:
        given: As for `gd`.
        step: gamma, in weight space.
        rounds: J, of the link.

    Returns:
        The descent of a whole link: of J rounds.

    Raises:
        ConfigError: If the step is above 1 / L, ``rounds`` is below 1, or lambda_min is 0.
    """
    _check(given, step, 1 / given.smoothness)
    _check_rounds(rounds)
    left = (1 - step * given.smoothness) ** (2 * rounds)
    progress = (1 - left) * given.lambda_min / (2 * given.smoothness)
    return Descent(progress, 0.0, given, "derived here, section 10")


def noisy_link(one: Descent, rounds: int) -> Descent:
    """Bound a link of several rounds under one sketch, taken as one round, where there is noise.

    Source: derived here (docs/records/theory.md, section 10). Only the first round counts as
    progress, and the noise of the others is not independent of the sketch, so that they have
    lambda_max 1.

    Args:
        one: Of a round: `sgd`, `reshuffling` or `federated`.
        rounds: J, of the link.

    Returns:
        The descent of a whole link: of J rounds.

    Raises:
        ConfigError: If ``rounds`` is below 1.
    """
    _check_rounds(rounds)
    error = one.error * (1 + (rounds - 1) / one.given.lambda_max)
    return Descent(one.progress, error, one.given, "derived here, section 10")


def local_step_limit(
    smoothness: float,
    local_steps: int,
    clients: int = 1,
    cohort: int = 1,
    server_step: float = 1.0,
) -> float:
    """Compute the largest step that `federated` allows: 1 / (max(2 sqrt(c), server_step) L N)."""
    most = max(2 * sqrt(_spread(clients, cohort, server_step)), server_step)
    return 1 / (most * smoothness * local_steps)


def _spread(clients: int, cohort: int, server_step: float) -> float:
    """Compute the c of docs/records/theory.md, section 4: 1 + omega for plain averaging."""
    return 1 + min(server_step, 2.0) * sampling(clients, cohort)


def sampling(clients: int, cohort: int) -> float:
    """Compute omega = (M - K) / (K (M - 1)), a cohort mean's variance; 0 if all take part."""
    if not 1 <= cohort <= clients:
        raise ConfigError(f"cohort={cohort}: expected 1 to clients={clients}")
    return 0.0 if cohort == clients else (clients - cohort) / (cohort * (clients - 1))


def reshuffling(given: Given, step: float, local_steps: int) -> Descent:
    """Bound random reshuffling: one sketch for each epoch of ``local_steps`` batches.

    `federated` with one client. Source: derived here (docs/records/theory.md, section 4); the
    paper's own theorem was not available.

    Args:
        given: As for `federated`; zeta_sq is 0.
        step: gamma of a batch's step.
        local_steps: N, batches of an epoch.

    Raises:
        ConfigError: If the step is above 1 / (2 L N), or lambda_min is 0.
    """
    if given.zeta_sq:
        raise ConfigError(f"zeta_sq is {given.zeta_sq}, but one client does not differ from itself")
    return federated(given, step, local_steps)


def federated(
    given: Given,
    step: float,
    local_steps: int,
    clients: int = 1,
    cohort: int = 1,
    server_step: float = 1.0,
) -> Descent:
    """Bound Fed-RAC-LoRA: local random reshuffling under a shared sketch, and averaging.

    Each client of a uniformly drawn cohort takes one local epoch of N batches; all clients have
    equally many samples and weigh the same. Source: derived here (docs/records/theory.md, section
    4); the federated theorem of arXiv 2410.08305 was not available.

    With ``sketches = G`` and ``server_lr = G eta``, of a kind with orthonormal rows, the same holds
    with lambda_min and lambda_max of the whole drawing of G r rows, a cohort of K / G, and
    ``server_step = eta``: each column is trained by one group.

    Args:
        given: L (of every batch's loss), gap, mu, sigma_sq, zeta_sq, lambda_min, lambda_max.
        step: gamma of a local step, in weight space.
        local_steps: N.
        clients: M.
        cohort: K, drawn uniformly without replacement in each round.
        server_step: eta, by which the server goes along the mean change.

    Raises:
        ConfigError: If the step is above `local_step_limit`, or lambda_min is 0.
    """
    if not server_step > 0:
        raise ConfigError(f"server_step={server_step}: expected a positive number")
    omega, c = sampling(clients, cohort), _spread(clients, cohort, server_step)
    L, N, whole = given.smoothness, local_steps, server_step * step * local_steps
    _check(given, step, local_step_limit(L, N, clients, cohort, server_step))
    drift = (N + 1) * given.sigma_sq + 2 * N**2 * given.zeta_sq
    error = c * whole * (L * step) ** 2 * drift / 2 + L * whole**2 * omega * given.zeta_sq
    source = "derived here, section 4"
    return Descent(whole * given.lambda_min / 4, given.lambda_max * error, given, source)


def cover(given: Given, step: float, blocks: int) -> Descent:
    """Bound gradient descent through the blocks of one orthonormal basis; a round is a cover.

    Given the blocks before it a block has lambda_min = 0, so the other theorems are silent. This
    one holds for every basis, so for every draw and not only in the mean. It is a bound on cyclic
    block descent in the manner of Beck and Tetruashvili, *On the convergence of block coordinate
    descent type methods*, SIAM J. Optim. 2013. Source: derived here (docs/records/theory.md,
    section 5).

    Args:
        given: L, gap, mu, curvature; the spectrum of E[H] is not used.
        step: gamma, in weight space.
        blocks: J, rounds of a cover: dim / rank, the same whole number in every layer.

    Returns:
        The descent of a whole cover: of J rounds.

    Raises:
        ConfigError: If the step is above 1 / L, or ``blocks`` is below 1.
    """
    _check(given, step, 1 / given.smoothness, isotropic=False)
    if blocks < 1:
        raise ConfigError(f"blocks is {blocks}; a cover has 1 or more")
    least = -given.smoothness if given.curvature is None else given.curvature
    spread = 1 + step * (given.smoothness - least) / 2 * sqrt(blocks - 1)
    return Descent(step / (2 * spread**2), 0.0, given, "derived here, section 5")


def _check_rounds(rounds: int) -> None:
    """Reject a link without rounds."""
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}; a link has 1 or more")


def _check(given: Given, step: float, limit: float, *, isotropic: bool = True) -> None:
    """Reject a step above the limit, and a sketch that misses a direction for certain."""
    if not 0 < step <= limit * (1 + STEP_ROUNDING):
        raise ConfigError(f"step is {step:.6g}; the theorem needs a step in (0, {limit:.6g}]")
    if isotropic and given.lambda_min <= 0:
        raise ConfigError(
            "lambda_min is 0: no step is ever taken in some direction (given the past, blocks: "
            "cover is such a case), so that this theorem says nothing; use `cover`"
        )
