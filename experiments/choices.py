"""The choices of the config groups, read from the folder ``conf``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedraclora.errors import ConfigError, unknown

CONF = Path(__file__).resolve().parents[1] / "conf"


def groups() -> dict[str, dict[str, str]]:
    """List the config groups: group -> choice -> the first comment line of its file."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        lines = path.read_text().splitlines()
        first = next(text for text in lines if "@package" not in text)  # Hydra wants that on line 1
        found.setdefault(path.parent.name, {})[path.stem] = first.lstrip("# ").rstrip()
    return found


def composed(overrides: Sequence[str]) -> dict[str, object]:
    """Compose the config as the command line would, as a plain, resolved dict.

    Args:
        overrides: Hydra's, for example ``["method=fedavg", "seed=1"]``.

    Returns:
        The config.

    Raises:
        ConfigError: If it does not compose.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            config = compose("config", overrides=list(overrides))
    except HydraException as error:
        raise ConfigError(str(error)) from error
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return {str(key): value for key, value in dict(plain).items()}  # type: ignore[arg-type]


def check_choices(words: Sequence[str]) -> None:
    """Refuse a choice of a group that does not exist, before Hydra composes.

    Raises:
        ConfigError: With the choices that exist and the nearest one.
    """
    table = groups()
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if "(" in value:  # Hydra's own syntax for sweeps
            continue
        if key not in table or not value:
            continue
        for choice in value.split(","):
            if choice not in table[key]:
                raise unknown(key, choice, table[key])
