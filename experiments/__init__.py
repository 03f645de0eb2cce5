"""Entry points: each module runs as `python -m experiments.<name>` and may import everything."""

from pathlib import Path

CONF = Path(__file__).resolve().parents[1] / "conf"  # the files that Hydra composes
