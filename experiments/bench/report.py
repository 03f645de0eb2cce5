"""The JSON file of a workload: rows, machine, versions."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedraclora.errors import ConfigError
from fedraclora.experiments.bench.workloads import WORKLOADS
from fedraclora.run.folder import git_revision

PACKAGES = ("torch", "flwr", "ray", "numpy")
Rows = Mapping[str, Mapping[str, Any]]


@dataclass
class Report:
    """What was found for one workload.

    Attributes:
        workload: Its name.
        rows: Figures by name of the row.
        missing: Rows that were wanted, and why they are not there.
        about: Machine, versions, revision.
    """

    workload: str
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``<workload>.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        found = {"what": WORKLOADS[self.workload].what, **vars(self)}
        text = json.dumps(found, indent=1, default=str)
        (folder / f"{self.workload}.json").write_text(text + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a file of `write` back.

        Raises:
            ConfigError: If it is no such file.
        """
        try:
            found = json.loads(path.read_text())
            return cls(found["workload"], found["rows"], found["missing"], found["about"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} holds no figures of the benchmark: {error}") from error


def about(device: torch.device, threads: int) -> dict[str, object]:
    """Name the machine, the versions and the revision."""
    found: dict[str, object] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "device": device.type,
        "threads": threads,
        "versions": {package: version(package) for package in PACKAGES},
        "git": git_revision(),
    }
    if device.type == "cuda":
        found["card"] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    """Name the processor as Linux does, or as Python does elsewhere."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
