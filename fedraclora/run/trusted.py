"""The config of a run folder that may be of others, before anything is built of it."""

from __future__ import annotations

from pathlib import Path

from fedraclora.binding import Plain
from fedraclora.run.folder import read_config
from fedraclora.trust import names_in, refuse_unsaid


def read_trusted(folder: Path, own: Plain | None = None) -> Plain:
    """Read the config of a run that is to be built: all code that it names is trusted, or own.

    Args:
        folder: The run folder.
        own: A config of the user's own; what it names, too, need not be trusted.

    Raises:
        CheckpointError: As `read_config`.
        ConfigError: Naming all code that would be run.
    """
    config = read_config(folder)
    refuse_unsaid(folder / "config.yaml", names_in(config), names_in(own or {}).values())
    return config
