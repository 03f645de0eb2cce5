"""Every command, one file or folder each; what the terminal and the report show of runs."""

from pathlib import Path

from fedraclora import errors
from fedraclora.errors import ConfigError

CODE = Path(errors.__file__).resolve().parent  # the package
LABORATORY = CODE / "experiments"  # of a source checkout; a wheel has none
# Where a study writes that is told no place: of record in a checkout, a folder each.
RESULTS = LABORATORY / "results" if LABORATORY.is_dir() else Path("runs") / "studies"


def require_laboratory(what: str) -> None:
    """Check that the laboratory is there.

    Args:
        what: Who asks for it, for the message.

    Raises:
        ConfigError: If this is an installed package, which has none.
    """
    if not LABORATORY.is_dir():
        raise ConfigError(
            f"{what} needs the folder experiments, which the installed package does not contain: "
            "run it from a source checkout"
        )
