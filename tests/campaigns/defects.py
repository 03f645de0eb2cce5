"""``python -m tests.campaigns.defects``: plants defects of public code; the tests must find them.

Each defect replaces a function or two of the project in a process of its own, in which the contract
suite runs (for the methods that are concerned, or the test of the law). It must fail in an
assertion, and say which law of `tests/contract/laws.py` is broken; without the defect it passes.
Keys:

  only=   names of defects, with commas
  out=    a file to write the record to, in Markdown

One defect by hand: ``pytest -p tests.campaigns.defects --defect NAME``.

The defects are those that were found in public implementations of federated low-rank methods, and
the ways to get their algebra wrong that lie beside them, and the like for server optimizers,
control variates, buffers, numbers in fewer bits, pools and projected gradients. Methods are tested
under alpha != rank, m != n and unequal weights, or most of these would pass.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedraclora.commands.status import reported
from fedraclora.compose.words import key_values
from fedraclora.errors import ConfigError, unknown
from tests.campaigns.defects_methods import METHOD_DEFECTS
from tests.campaigns.defects_server import SERVER_DEFECTS
from tests.campaigns.defects_wire import WIRE_DEFECTS
from tests.campaigns.planting import Defect
from tests.contract.laws import BROKEN, BY_TEST, Law

ROOT = Path(__file__).resolve().parents[2]
DEFECTS = {defect.name: defect for defect in (*METHOD_DEFECTS, *SERVER_DEFECTS, *WIRE_DEFECTS)}
SUITE = (
    "tests/contract/test_method_contract.py",
    "tests/contract/test_method_runs.py",
    "tests/contract/test_personal_methods.py",
)
PLANTED = pytest.StashKey[ExitStack]()
FOUND = pytest.StashKey[str]()


# ---- The plugin of pytest: plants a defect, and stops at the first assertion that finds it ------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the defect."""
    parser.addoption("--defect", choices=[*DEFECTS], help="plant this defect in the code first")


def pytest_configure(config: pytest.Config) -> None:
    """Plant the defect, before any test is imported."""
    config.stash[PLANTED] = ExitStack()
    if name := config.getoption("--defect"):
        config.stash[PLANTED].enter_context(DEFECTS[name].planted())


def pytest_unconfigure(config: pytest.Config) -> None:
    """Take it out again."""
    config.stash[PLANTED].close()


def pytest_exception_interact(node: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Stop at an assertion that failed; an error of another kind has found nothing."""
    failed = call.excinfo is not None and call.excinfo.errisinstance(BROKEN)
    if failed and call.when == "call":
        node.config.stash[FOUND] = node.name
        node.session.shouldfail = f"{node.name} found it"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line which test found it."""
    if found := terminalreporter.config.stash.get(FOUND, ""):
        terminalreporter.write_line(f"found by {found}")


# ---- The campaign ---------------------------------------------------------------------


def found_by(defect: Defect, methods: str | None = None) -> str:
    """Run the tests that a defect concerns in a process that has it; give the one that failed.

    Args:
        defect: What is planted.
        methods: A pytest expression in the place of the defect's own.

    Returns:
        The name of the test, empty if all passed.
    """
    chosen = methods or defect.methods
    if not defect.tests:
        chosen = f"({chosen}) and not cover and not gaussian and not auto"
    words = ["-q", "-p", "no:cacheprovider", "-p", "tests.campaigns.defects"]
    words += ["--defect", defect.name, *(defect.tests or SUITE), "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"^found by (.+)$", done.stdout, flags=re.MULTILINE)
    if found is None and done.returncode:
        tail = done.stdout[-2000:] + done.stderr[-2000:]
        raise RuntimeError(
            f"{defect.name}: no assertion failed, and yet not all went well:\n{tail}"
        )
    if found and (law := law_of(found[1])) and str(law) not in done.stdout:
        raise RuntimeError(f"{defect.name}: {found[1]} does not say its law")
    return found[1] if found else ""


def law_of(test: str) -> Law | None:
    """Give the law that a test of all methods holds, by its name with or without parameters."""
    return BY_TEST.get(test.partition("[")[0])


@reported
def main(words: Sequence[str] | None = None) -> int:
    """Plant every defect; status 1 if one is not found."""
    keys = key_values(sys.argv[1:] if words is None else words)
    if not keys.keys() <= {"only", "out"}:
        raise ConfigError("defects takes only=NAME,NAME and out=FILE")
    wanted = str(keys["only"]).split(",") if "only" in keys else [*DEFECTS]
    for name in wanted:
        if name not in DEFECTS:
            raise unknown("defect", name, DEFECTS)
    rows = ["| defect | found by | law | seen |", "|---|---|---|---|"]
    missed = []
    for name in wanted:
        try:
            found = found_by(DEFECTS[name])
        except RuntimeError as error:  # the defect itself does not run: the others are tried still
            found = ""
            print(error, flush=True)
        print(f"{name}: {found or 'NOT FOUND'}", flush=True)
        if not found:
            missed.append(name)
        law = getattr(law_of(found), "says", "its own")
        rows.append(f"| {name} | `{found or 'nothing'}` | {law} | {DEFECTS[name].seen} |")
    if "out" in keys:
        Path(str(keys["out"])).write_text("\n".join(rows) + "\n")
    if missed:
        print(f"not found: {', '.join(missed)}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
