"""Packages that an installation may lack: what needs one says how to get it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedraclora.data.gguf_header import read_gguf_header
from fedraclora.errors import ConfigError
from fedraclora.imports import EXTRAS, import_extra
from fedraclora.loggers import LOGGERS, logging_to
from fedraclora.privacy.accountant import epsilon, noise_for

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LACKING = f"""
import sys

sys.modules.update(dict.fromkeys({[*EXTRAS]!r}))  # as if none were installed
from fedraclora.commands.cli import main

main(sys.argv[1:])
"""


def packages(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in requirements}


@pytest.mark.parametrize("package", EXTRAS)
def test_the_extra_that_an_error_names_has_the_package(package: str) -> None:
    extras = PROJECT["optional-dependencies"]
    assert package in packages(extras[EXTRAS[package]])
    assert package not in packages(PROJECT["dependencies"])


@pytest.mark.parametrize("package", EXTRAS)
def test_a_package_that_is_missing_is_named_with_its_extra(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"^This .*{package}.*'\.\[{EXTRAS[package]}\]'"):
        import_extra(package, "This")


def test_what_needs_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in EXTRAS:
        for name in (n for n in [*sys.modules] if n.partition(".")[0] == package):
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, package, None)
    needing = {
        "privacy": [
            lambda: epsilon(1.25, 0.5, 3, 1e-5),
            lambda: noise_for(1.25, 0.5, 3, 1e-5),
        ],
        "loggers": [lambda name=name: logging_to([name]) for name in LOGGERS],
        "export": [lambda: read_gguf_header(Path("model.gguf"), "model.path")],
    }
    for extra, calls in needing.items():
        for call in calls:
            with pytest.raises(ConfigError, match=rf"'\.\[{extra}\]'"):
                call()


@pytest.mark.slow
def test_the_first_commands_need_no_extra(tmp_path: Path) -> None:
    words = [
        "data=digits",
        "pretrain=none",
        "clients=4",
        "clients_per_round=2",
        "rounds=2",
        f"output.dir={tmp_path}/out",
    ]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", LACKING, *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("compare", "method=fed_rac_lora,fedavg_lora", *words, "output.dir=out")
    assert done.returncode == 0, done.stderr
    assert {"table.md", "compare.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / "report.html").exists()
    assert "[report]" in done.stdout
    for asked in (["report", "out"], ["watch", "out"]):
        refused = run(*asked)
        assert refused.returncode == 1
        assert "plotly" in refused.stderr
        assert "[report]" in refused.stderr
