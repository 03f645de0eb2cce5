"""Entry points: what commands and the front door run; may import everything below."""

from pathlib import Path

from fedraclora import conf, errors

CODE = Path(errors.__file__).resolve().parent  # the package
CONF = Path(conf.__file__).resolve().parent  # the files that Hydra composes
RESULTS = Path(__file__).parent / "results"  # of record, a folder each
