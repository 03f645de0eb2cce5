"""From words, files and objects to the plain config of a run: Hydra begins and ends here."""

from pathlib import Path

from fedraclora import conf

CONF = Path(conf.__file__).resolve().parent  # the files that Hydra composes
