"""Entry points: each module runs as `python -m experiments.<name>` and may import everything."""

from pathlib import Path

import fedraclora  # noqa: F401 (first: it sets what Flower and Ray read when they are imported)

CONF = Path(__file__).resolve().parents[1] / "conf"  # the files that Hydra composes
RESULTS = Path(__file__).parent / "results"  # of record, a folder each

Plain = dict[str, object]  # a config as plain values, nested
