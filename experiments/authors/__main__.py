"""Run checks, and write their table; see `fedraclora.experiments.authors`."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedraclora.commands import RESULTS
from fedraclora.commands.status import reported
from fedraclora.errors import ConfigError, unknown
from fedraclora.experiments import authors
from fedraclora.experiments.authors.check import CodeCheck
from fedraclora.terminal.tables import TextTable

FILE = RESULTS / "authors" / "authors.jsonl"


def checks() -> dict[str, CodeCheck]:
    """Find the checks, by the names of their modules."""
    names = sorted(module.name for module in pkgutil.iter_modules(authors.__path__))
    modules = {n: importlib.import_module(f"{authors.__name__}.{n}") for n in names if n[0] != "_"}
    return {n: module.CHECK for n, module in modules.items() if hasattr(module, "CHECK")}


def kept(file: Path = FILE) -> dict[str, dict[str, Any]]:
    """Read what was found, by check."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {str(found["check"]): found for found in map(json.loads, lines)}


def is_new(check: CodeCheck, found: Mapping[str, object]) -> bool:
    """Return whether a check differs from what was run."""
    return (check.commit, check.compared) != (found.get("commit"), found.get("compared"))


def run(name: str, check: CodeCheck, folder: Path) -> dict[str, object]:
    """Run a check.

    Raises:
        ConfigError: If ours and theirs differ by more than the check allows.
    """
    found = {key: float(f"{value:.1e}") for key, value in check.run(check.at(folder)).items()}
    if far := {key: value for key, value in found.items() if not value <= check.within}:
        raise ConfigError(
            f"{name}: differs from {check.repository} by {far}, {check.within} are allowed"
        )
    told = {"method": check.method, "repository": check.repository, "commit": check.commit}
    return {"check": name, **told, "compared": check.compared, "difference": found}


def write_table(folder: Path, out: Path) -> None:
    """Write the table of what is kept: a row for each check, with the largest of its differences.

    Args:
        folder: That has the kept results.
        out: Where ``authors.md`` is written.
    """
    head = ("method", "code", "commit", "compared", "largest difference")
    rows = []
    for found in kept(folder / FILE.name).values():
        words = [str(found[key]) for key in ("repository", "commit", "compared")]
        rows.append((f"`{found['method']}`", *words, f"{max(found['difference'].values()):.0e}"))
    table = TextTable(head, tuple(sorted(rows)), (), texts=4)
    (out / FILE.with_suffix(".md").name).write_text(table.markdown(), encoding="utf-8")


@reported
def main() -> int:
    """Run what the command names."""
    known = checks()
    parser = argparse.ArgumentParser(prog="python -m fedraclora.experiments.authors")
    parser.add_argument("folder", type=Path, help="of the clones, each named OWNER+NAME")
    parser.add_argument("check", nargs="*", help=f"of {', '.join(known)}")
    parser.add_argument("--again", action="store_true", help="run what has been run, too")
    asked = parser.parse_args()
    for name in asked.check:
        if name not in known:
            raise unknown("check", name, known)
    results = kept()
    for name in asked.check or known:
        check = known[name]
        if not check.at(asked.folder).clone.is_dir():
            print(f"{name}: no clone {check.at(asked.folder).clone}, left out")
        elif asked.again or is_new(check, results.get(name, {})):
            results[name] = run(name, check, asked.folder)
            FILE.parent.mkdir(parents=True, exist_ok=True)
            ordered = [results[each] for each in sorted(results)]
            FILE.write_text("".join(f"{json.dumps(r)}\n" for r in ordered), encoding="utf-8")
            write_table(FILE.parent, FILE.parent)
            print(f"{name}: {results[name]['difference']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
