"""The notebook runs from its first cell to its last, and shows what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "quickstart.ipynb"
MOST = 20_000  # bytes: it is kept without what its cells gave
# In a process of its own: a client of notebooks brings an event loop, and warnings of its own.
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
book = nbformat.read(open(sys.argv[1]), 4)
NotebookClient(book, timeout=300, resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(book, sys.argv[3])
"""


def outputs(path: Path) -> list[dict[str, Any]]:
    """What the cells with code gave, each by its kind; texts are lists of lines."""
    cells = json.loads(path.read_text())["cells"]
    shown = (output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    return [data for data in shown if data]


def test_it_is_kept_without_outputs() -> None:
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert cells
    assert not [c for c in cells if c["outputs"] or c["execution_count"] is not None]
    assert NOTEBOOK.stat().st_size < MOST


@pytest.mark.long
def test_it_runs_and_shows_history_curves_figures_and_files(tmp_path: Path) -> None:
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package)
    done = tmp_path / "done.ipynb"
    words = [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(tmp_path), str(done)]
    env = {**os.environ, "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    ran = subprocess.run(words, env=env, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    shown = outputs(done)
    run, history, curves, measured, kept, other = shown
    assert "rounds=30" in "".join(run["text/plain"])
    assert "accuracy" in "".join(history["text/html"])
    assert len(curves["image/png"]) > MOST
    measures = "".join(measured["text/plain"])
    assert measures.count("accuracy") == 2
    assert float(measures.split("'accuracy': ")[1].split(",")[0]) > 0.75
    assert "model.safetensors" in "".join(kept["text/plain"])
    assert (tmp_path / "result" / "history.csv").is_file()
    assert "accuracy" in "".join(other["text/plain"])
