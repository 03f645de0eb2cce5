"""Checks of numbers that come from the configuration; every message names the key."""

from __future__ import annotations

from fedraclora.errors import ConfigError


def check_fraction(key: str, value: object) -> None:
    """Require a number in [0, 1).

    Raises:
        ConfigError: If it is anything else.
    """
    if not _is_number(value) or not 0 <= value < 1:  # type: ignore[operator]
        raise ConfigError(f"{key}={value}: want a fraction, at least 0 and below 1")


def check_count(key: str, value: object, least: int = 1) -> None:
    """Require a whole number of at least ``least``.

    Raises:
        ConfigError: If it is anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key}={value}: want a whole number, at least {least}")


def check_number(key: str, value: object, least: float, *, above: bool = False) -> None:
    """Require a finite number of at least ``least`` (greater than it where ``above`` is set).

    Raises:
        ConfigError: If it is anything else.
    """
    finite = _is_number(value) and float("-inf") < value < float("inf")  # type: ignore[operator]
    if not finite or value < least or (above and value == least):  # type: ignore[operator]
        bound = "above" if above else "at least"
        raise ConfigError(f"{key}={value}: want a number, {bound} {least:g}")


def check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Require one of the given words.

    Raises:
        ConfigError: If it is anything else.
    """
    if value not in choices:
        raise ConfigError(f"{key}={value}: want one of {', '.join(choices)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
