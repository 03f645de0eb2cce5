"""Which keys may change when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping

from fedraclora.binding import Plain

# Keys that move no bit of the weights of a run.
ALWAYS = ("max_failures",)
MEASURED = ("evaluate.every", "evaluate.batch_size", "evaluate.clients_every")
PATHS = ("file", "samples", "test_file", "tokenizer")  # keys of data that name files
CLIENTS, DATA_CLIENTS = "clients", "data.clients"
GROWS = (CLIENTS, DATA_CLIENTS, "clients_per_round")  # change if further clients join a run


def free_keys(plain: Plain) -> tuple[str, ...]:
    """Return the dotted keys whose values may change when a run is resumed.

    Not among them are ``output`` and ``engine``, which are no part of what decides bits, and
    ``device``, of which only what it comes to counts.

    - ``max_failures`` decides whether a round is given up, and not what comes of it.
    - ``evaluate.every`` and ``evaluate.batch_size`` decide when and in which order of sums the
      server measures; with ``stop.patience`` that decides when the run ends.
    - ``rounds``, where nothing is planned over all of them.
    - Files and folders of the data may lie elsewhere: what is in them is known by digest.
    - The number of clients, where further ones may join a run (`fixed_clients`). It does change
      the rounds after: the ledger says from which round on.

    Args:
        plain: The config of the run.
    """
    stops = _get(plain, "stop", "patience") is not None
    measured = () if stops else MEASURED
    rounds = () if plans_rounds(plain) else ("rounds",)
    clients = () if fixed_clients(plain) else GROWS
    return (*ALWAYS, *measured, *rounds, *clients, *(f"data.{key}" for key in PATHS))


def fixed_clients(plain: Plain) -> str | None:
    """Say why no further client may join a run that is resumed; None if one may.

    Samples of the clients so far stay theirs only if each brings its own, and the privacy of a run
    is accounted for a number of clients.
    """
    for group, wanted in (("engine", "deploy"), ("data", "own"), ("privacy", "none")):
        if (found := _get(plain, group, "name")) != wanted:
            return (
                f"further clients may join only with {group}={wanted}; this run has {group}={found}"
            )
    if _get(plain, "local", "name") == "dp_sgd":
        return "further clients may not join a run with local=dp_sgd"
    return None


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
