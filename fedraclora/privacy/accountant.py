"""Compute privacy costs with the library dp-accounting, for the two kinds of noise used here.

Epsilon comes from the library's Renyi accountant with its default orders; nothing is derived here.
The library takes a second to load and is an extra, so runs without privacy do not load it.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import TYPE_CHECKING

from fedraclora.errors import ConfigError
from fedraclora.imports import import_extra

if TYPE_CHECKING:
    from dp_accounting import dp_event

LARGEST_NOISE = 1e4
PURPOSE = "The epsilon of privacy=client_level or sample_level"
Releases = tuple[float, float, int]  # their noise, with which probability, how many
# It warns of each order that it leaves out, of which the bound gets no tighter, and no less true.
logging.getLogger("absl").setLevel(logging.ERROR)


def release(noise: float, sampling: float) -> dp_event.DpEvent:
    """Describe one release: a sum with Gaussian noise, each client's part of norm at most 1.

    Args:
        noise: Standard deviation.
        sampling: Probability of each client to take part, independently; 1: all take part.
    """
    dp_event = import_extra("dp_accounting.dp_event", PURPOSE)
    gaussian = dp_event.GaussianDpEvent(noise)
    return gaussian if sampling >= 1 else dp_event.PoissonSampledDpEvent(sampling, gaussian)


@cache  # 50 ms each: a resumed run and its page ask for the same value again
def epsilon(noise: float, sampling: float, releases: int, delta: float, *beside: Releases) -> float:
    """Compute epsilon after some releases; neighbouring data differ by one client or sample.

    Args:
        noise: Standard deviation of a release, in units of the sensitivity; 0 protects no one.
        sampling: As in `release`.
        releases: 0 or more.
        delta: The probability with which epsilon may not hold.
        *beside: Other releases about the same clients, with independent randomness.

    Example:
        >>> epsilon(1.0, 0.1, 0, 1e-5), epsilon(0.0, 0.1, 3, 1e-5)
        (0.0, inf)
    """
    parts = [part for part in ((noise, sampling, releases), *beside) if part[2]]
    if not parts or not all(part[0] for part in parts):
        return math.inf if parts else 0.0
    accountant = import_extra("dp_accounting.rdp", PURPOSE).RdpAccountant()
    for deviation, chance, count in parts:
        accountant.compose(release(deviation, chance), count)
    return float(accountant.get_epsilon(delta))


def noise_for(
    target: float, sampling: float, releases: int, delta: float, *beside: Releases
) -> float:
    """Find the smallest noise, to 1e-4, with which all releases cost at most ``target``.

    Args:
        target: Epsilon, including the releases ``beside``.
        sampling: As for `epsilon`.
        releases: As for `epsilon`.
        delta: As for `epsilon`.
        *beside: As for `epsilon`.

    Raises:
        ConfigError: If no noise up to `LARGEST_NOISE` is enough.
    """
    dp_event = import_extra("dp_accounting.dp_event", PURPOSE)
    calibration = import_extra("dp_accounting.mechanism_calibration", PURPOSE)
    try:
        return float(
            calibration.calibrate_dp_mechanism(
                import_extra("dp_accounting.rdp", PURPOSE).RdpAccountant,
                lambda noise: dp_event.ComposedDpEvent(
                    [
                        dp_event.SelfComposedDpEvent(release(deviation, chance), count)
                        for deviation, chance, count in ((noise, sampling, releases), *beside)
                    ]
                ),
                target,
                delta,
                calibration.ExplicitBracketInterval(1e-2, LARGEST_NOISE),
                tol=1e-4,
            )
        )
    except (ValueError, calibration.NoBracketIntervalFoundError) as error:
        raise ConfigError(
            f"no noise makes {releases} rounds cost epsilon {target} at delta {delta}: {error}; "
            f"raise privacy.target_epsilon{' or privacy.measure_noise' if beside else ''} or take "
            "fewer rounds"
        ) from error
