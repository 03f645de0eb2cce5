"""Flower and Ray report nothing to anyone, unless the environment says that they may."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

REPORTS = ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED")
ASKED = """
import fedraclora.commands.cli
from flwr.supercore import telemetry
from ray._common.usage import usage_lib
print(telemetry.FLWR_TELEMETRY_ENABLED, int(usage_lib.usage_stats_enabled()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("value", "said"), [(None, "0 0"), ("1", "1 1")])
def test_reports_are_off_unless_asked_for(value: str | None, said: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in REPORTS}
    environment |= {} if value is None else dict.fromkeys(REPORTS, value)
    command = [sys.executable, "-c", ASKED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == said, done.stderr
