"""Groups of a config that is not checked yet."""

from __future__ import annotations

from collections.abc import Mapping

from fedraclora.binding import Plain, PlainDict, without
from fedraclora.errors import ConfigError

__all__ = ["Plain", "PlainDict", "section", "without"]


def section(plain: Plain, key: str) -> dict[str, object]:
    """Return one group of the config as a dict.

    Raises:
        ConfigError: If it is missing or not a group.
    """
    value = plain.get(key)
    if not isinstance(value, Mapping):
        hint = "" if value is None else f": it has keys of its own (simulate {key} --help)"
        raise ConfigError(f"the config needs a section {key}, but has {key}={value!r}{hint}")
    return dict(value)
