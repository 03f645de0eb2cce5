"""Which keys may change when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping

from fedraclora.binding import Plain

# Keys that move no bit of the weights of a run.
ALWAYS = ("max_failures",)
MEASURED = ("evaluate.every", "evaluate.batch_size", "evaluate.clients_every")
PATHS = ("file", "samples", "test_file", "tokenizer")  # keys of data that name files


def free_keys(plain: Plain) -> tuple[str, ...]:
    """Return the dotted keys whose values may change when a run is resumed.

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
