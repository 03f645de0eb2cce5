"""The commands of ``fedraclora``, one file or folder each, and how runs are displayed."""

from pathlib import Path

from fedraclora import errors
from fedraclora.errors import ConfigError

CODE = Path(errors.__file__).resolve().parent  # the package
LABORATORY = CODE / "experiments"  # of a source checkout; a wheel has none
# Default folder of study results: in a checkout, the results that are kept under version control.
RESULTS = LABORATORY / "results" if LABORATORY.is_dir() else Path("runs") / "studies"


def require_laboratory(what: str) -> None:
    """Check that the folder ``experiments`` exists.

    Args:
        what: The command or study that needs it, for the error message.

    Raises:
        ConfigError: If this is an installed package, which does not contain it.
    """
    if not LABORATORY.is_dir():
        raise ConfigError(
            f"{what} needs the folder experiments, which the installed package does not contain: "
            "run it from a source checkout"
        )
