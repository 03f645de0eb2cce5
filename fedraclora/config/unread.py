"""Check across groups of the config: keys without effect, and parts that exclude each other.

A key at its default is always allowed: the files of `conf` list the keys of their group. A user who
set a key to another value expects an effect.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

from fedraclora.binding import Plain, without
from fedraclora.compatibility import Choice, Features, refuse
from fedraclora.config.table_rows import TableRow
from fedraclora.data.own_loss import is_own, named_loss, short_name
from fedraclora.errors import ConfigError, UnreadKeysError, nearest, unknown
from fedraclora.evaluation.metrics import MEASURED, PERSONAL
from fedraclora.protocol.cohorts import cohort_size
from fedraclora.renamed import renamed
from fedraclora.training.extras.settings import READ_BY_OWN

if TYPE_CHECKING:
    from fedraclora.config.run_config import RunConfig


def as_read(plain: Plain) -> dict[str, object]:
    """Remove from a config the keys that have no effect with local=own."""
    local, engine = (plain.get(key) for key in ("local", "engine"))
    if not isinstance(local, Mapping) or local.get("train") is None:
        return dict(plain)
    kept = {key: value for key, value in local.items() if key in {"name", *READ_BY_OWN}}
    found = {**plain, "local": kept}
    return found | ({"engine": without(engine, "chunk")} if isinstance(engine, Mapping) else {})


def config_parts(config: RunConfig) -> list[object]:
    """List the parts of a run that its config alone makes; each may declare features."""
    rows = (part for part in vars(config).values() if isinstance(part, TableRow))
    choices = [Choice(row.function, {**row.defaults, **row.group}) for row in rows]
    return [config, *vars(config).values(), *config.local.added, *choices]


def values_of(config: RunConfig) -> dict[str, tuple[object, object]]:
    """Return the value and the default of each key of a group, by its path."""
    found = dict[str, tuple[object, object]]()
    for group, part in vars(config).items():
        if isinstance(part, TableRow):
            values, defaults = part.group, part.defaults
        elif is_dataclass(part):
            values, defaults = vars(part), {each.name: each.default for each in fields(part)}
        else:
            continue
        found |= {f"{group}.{k}": (values[k], defaults[k]) for k in defaults if k in values}
    return found


def refuse_unknown(plain: Plain, known: Collection[str]) -> None:
    """Reject keys of the config itself that do not exist.

    Raises:
        UnreadKeysError: Naming them, and the nearest that are known.
    """
    if not (found := [key for key in plain if key not in known]):
        return
    groups = {key: group for key in known if isinstance(group := plain.get(key), Mapping)}
    whole = [f"{key}.{inner}" for key, group in groups.items() for inner in group]
    lines = [unknown_key(str(key), [*known, *whole]) for key in found]
    if "experiment" in found:
        lines.append("the first line of a preset of your own is '# @package _global_'")
    raise UnreadKeysError("\n  ".join(lines), found)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Build the error for an unknown key, with its new name or the nearest key."""
    if moved := renamed(key):
        return moved
    group = key.rpartition(".")[0].partition(".")[0]
    known = [*known]
    inside = [other for other in known if other.startswith(f"{group}.")]
    known = inside if group and inside else known  # of a group that exists its own keys are meant
    near = " or ".join(map(repr, nearest(key, known, count=2)))
    return (
        f"unknown key {key!r}{f'; did you mean {near}?' if near else '.'} `fedraclora simulate "
        "--cfg job` prints all keys"
    )


def refuse_conflicts(config: RunConfig, *, idle: bool) -> None:
    """Reject parts of a run that do not go together, all at once.

    Args:
        config: Of the run.
        idle: Whether settings that nothing reads are refused, too.

    Raises:
        UnreadKeysError: If some settings have no effect.
        ConfigError: If parts do not go together.
    """
    features = Features(config_parts(config))
    found = features.idle(values_of(config)) if idle else {}
    if found:
        raise UnreadKeysError("\n  ".join([*found.values(), *features.conflicts()]), found)
    refuse(features.conflicts())


def refuse_misfits(config: RunConfig) -> None:
    """Reject values of one group that another group makes impossible.

    Raises:
        ConfigError: Naming the key, and what to set.
    """
    asked, clients = config.clients_per_round, config.clients
    if clients is not None and cohort_size(asked, clients) > clients:
        raise ConfigError(
            f"clients_per_round={asked}, but there are only {clients} clients; "
            "lower clients_per_round or raise clients"
        )
    if config.choices["local"] == "own" and config.local.train is None:
        raise ConfigError(
            "local=own, but local.train names no training function. Set local.train=module:name "
            "(in Python fedraclora.simulate(train=function))."
        )
    said, stop = config.data.get("metrics"), config.stop.metric
    names = map(named_loss, said if isinstance(said, list) else ())
    known = {*MEASURED, *(short_name(name) for name in names if is_own(name))}
    if not stop.startswith("clients.") and stop.removeprefix(PERSONAL) not in known:
        raise unknown("stop.metric", stop, MEASURED)
