"""The theorems: each gives the constants of its descent inequality."""

from __future__ import annotations

from math import sqrt

from fedraclora.errors import ConfigError
from fedraclora.experiments.theory.bounds.descent import STEP_ROUNDING, Descent, Given
from fedraclora.protocol.quantised import BLOCK, FULL, LEVELS


def rounding(uplink: str, downlink: str) -> float:
    """Compute q: a change that is rounded on its way up and down has a mean square up to 1 + q.

    Source: derived here (docs/records/theory.md, section 3).

    Args:
        uplink: How numbers go up, `fedraclora.protocol.quantised`.
        downlink: How they go down.

    Example:
        >>> round(rounding("int8", "float32"), 5)
        0.00198
    """
    added = {kind: BLOCK / levels**2 for kind, levels in LEVELS.items()}
    added |= {"bfloat16": 2.0**-16, FULL: 0.0}
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
        raise ConfigError(f"cohort is {cohort}; 1 to clients={clients} is wanted")
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
        raise ConfigError(f"server_step is {server_step}; a positive number is wanted")
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
