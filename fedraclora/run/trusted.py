"""Check a run folder that may belong to others, before its config is built or it is written to."""

from __future__ import annotations

from pathlib import Path

from fedraclora.binding import Plain
from fedraclora.run.folder import is_ours, read_config
from fedraclora.trust import names_in, refuse_unsaid
from fedraclora.weights.files import refuse_links


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


def refuse_linked(place: Path) -> None:
    """Reject a place to write to in a run folder, or below, as `refuse_links` does.

    Raises:
        ConfigError: Naming the link.
    """
    for folder in (place.absolute(), *place.absolute().parents):
        if is_ours(folder):
            refuse_links(folder)
