"""Compose the plain config of a run from arguments, files and objects; only here is Hydra used."""

from pathlib import Path

from fedraclora import conf

CONF = Path(conf.__file__).resolve().parent  # the files that Hydra composes
