"""What may change where a run goes on: keys that move no bit of its weights."""

from __future__ import annotations

from collections.abc import Mapping

from fedraclora.config.schema import Plain
from fedraclora.run.digests import PATHS

ALWAYS = ("max_failures",)
MEASURED = ("evaluate.every", "evaluate.batch_size")


def free_keys(plain: Plain) -> tuple[str, ...]:
    """Name the keys, dotted, that a run may go on with other values of.

    Not among them are ``output`` and ``engine``, which are no part of what decides bits, and
    ``device``, of which only what it comes to counts.

    - ``max_failures`` decides whether a round is given up, and not what comes of it.
    - ``evaluate.every`` and ``evaluate.batch_size`` decide when and in which order of sums the
      server measures; with ``stop.patience`` that decides when the run ends.
    - ``rounds``, where nothing is planned over all of them.
    - Files and folders of the data may lie elsewhere: what is in them is known by digest.

    Args:
        plain: The config of the run.
    """
    stops = _get(plain, "stop", "patience") is not None
    measured = () if stops else MEASURED
    rounds = () if plans_rounds(plain) else ("rounds",)
    return (*ALWAYS, *measured, *rounds, *(f"data.{key}" for key in PATHS))


def plans_rounds(plain: Plain) -> str | None:
    """Name the key by which the number of rounds decides what each of them does; None: none."""
    schedule = _get(plain, "local", "schedule")
    if schedule not in {None, "constant", "step"}:
        return f"local.schedule={schedule}"
    if _get(plain, "privacy", "target_epsilon") is not None:
        return "privacy.target_epsilon"
    return None


def _get(plain: Plain, group: str, key: str) -> object:
    found = plain.get(group)
    return found.get(key) if isinstance(found, Mapping) else None
