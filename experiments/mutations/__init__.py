"""Plants defects of public code, and has the tests find them.

Each defect is a change of one line or two in a copy of the tree. The contract suite
(for the methods that are concerned, or the test of the law; in a process of its own) must fail on
the copy, in an assertion, and pass without the change.
The defects are those that were found in public implementations of federated low-rank methods, and
the ways to get their algebra wrong that lie beside them, and the like for server optimisers,
control variates and buffers. Methods are tested under alpha != rank, m != n and unequal weights,
or most of these would pass.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from experiments.mutations.defects import DEFECTS, Defect
from experiments.mutations.server_defects import SERVER_DEFECTS
from experiments.status import reported
from experiments.words import key_values
from fedraclora.errors import ConfigError, unknown

ROOT = Path(__file__).resolve().parents[2]
EVERY = (*DEFECTS, *SERVER_DEFECTS)
FOLDERS = ("fedraclora", "strategies", "clients", "conf", "experiments", "tests")
SUITE = (
    "tests/contract/test_method_contract.py",
    "tests/contract/test_method_runs.py",
    "tests/contract/test_personal_methods.py",
)


def planted(defect: Defect, folder: Path) -> None:
    """Write a copy of the tree with a defect into a folder.

    Raises:
        ValueError: If the text that is to be changed does not stand in its file once.
    """
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    text = (ROOT / defect.file).read_text()
    for old, new in defect.changes:
        if (count := text.count(old)) != 1:
            raise ValueError(f"{defect.name}: {old!r} stands {count} times in {defect.file}")
        text = text.replace(old, new)
    (folder / defect.file).write_text(text)


def failures(defect: Defect, root: Path) -> list[str]:
    """Run the suite for the methods of a defect in a tree; give the tests that failed."""
    chosen = defect.methods
    if not defect.tests:
        chosen = f"({chosen}) and not cover and not gaussian and not auto"
    done = subprocess.run(  # noqa: S603 (this interpreter, and words of this file)
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-x",
            *(defect.tests or SUITE),
            "-k",
            chosen,
        ],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{defect.name}: the suite did not run:\n{done.stdout[-2000:]}")
    return re.findall(r"^FAILED \S+::(\S+)", done.stdout, flags=re.MULTILINE)


@reported
def main(words: Sequence[str] | None = None) -> int:
    """Plant every defect; status 1 if one is not found, or the suite fails without any."""
    keys = key_values(sys.argv[1:] if words is None else words)
    if not keys.keys() <= {"only", "out"}:
        raise ConfigError("mutations takes only=NAME,NAME and out=FILE")
    names = [defect.name for defect in EVERY]
    wanted = str(keys["only"]).split(",") if "only" in keys else names
    for name in wanted:
        if name not in names:
            raise unknown("defect", name, names)
    chosen = [defect for defect in EVERY if defect.name in wanted]
    rows = ["| defect | found by | seen |", "|---|---|---|"]
    missed = []
    for defect in chosen:
        with tempfile.TemporaryDirectory() as folder:
            planted(defect, Path(folder))
            found = failures(defect, Path(folder))
        print(f"{defect.name}: {found[0] if found else 'NOT FOUND'}", flush=True)
        if not found:
            missed.append(defect.name)
        rows.append(f"| {defect.name} | `{found[0] if found else 'nothing'}` | {defect.seen} |")
    if "out" in keys:
        Path(str(keys["out"])).write_text("\n".join(rows) + "\n")
    return 1 if missed else 0
