"""Two spellings of one name are not two clients or two classes without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import fedraclora
from fedraclora.data.similar_names import check_similar
from fedraclora.errors import DataError
from tests.common import normal

QUIET = ("output.progress=false", "pretrain=none", "rounds=0")
X = normal(60, 2, key="names").float().numpy()
LABELS = np.where(X[:, 0] > 0, "ill", "well")
COMPOSED, APART = "caf\u00e9", "cafe\u0301"
SAME = {
    "blanks inside": ("ward a", "ward  a"),
    "another blank": ("ward a", "ward\u00a0a"),
    "a form of Unicode": (COMPOSED, APART),
    "a sign that nobody sees": ("a", "\u200ba"),
    "zeros": ("7", "7.0"),
}


@pytest.mark.parametrize("key", ["data.client", "data.label"])
@pytest.mark.parametrize("pair", [*SAME.values(), ("a", "a "), (" a", "a")])
def test_names_that_look_alike_are_refused_with_both(key: str, pair: tuple[str, str]) -> None:
    with pytest.raises(DataError) as raised:
        check_similar(key, [*pair, "other"])
    for part in (key, *map(ascii, pair)):
        assert part.strip("'") in str(raised.value)
    assert check_similar(key, ["1", "01", "1.5", "1.50", "a1", "a 1", "b"]) == []


def test_names_that_differ_in_case_are_said_and_stay_two() -> None:
    (said,) = check_similar("data.label", ["Ill", "ill", "well", "WELL", "x"])
    assert all(name in said for name in ("'Ill'", "'ill'", "'well'", "'WELL'"))


def brought(source: str, folder: Path, clients: list[str], labels: Any) -> dict[str, Any]:
    """What `simulate` takes for rows that say whose they are."""
    given: dict[str, Any] = {"model": "mlp"}
    frame = pd.DataFrame(X, columns=["p", "q"]).assign(label=labels, site=clients)
    if source == "arrays":
        np.savez(folder / "a.npz", x=X, target=np.array(labels), client=np.array(clients))
        return given | {"data": {"name": "arrays", "file": str(folder / "a.npz")}}
    if source == "table":
        frame.to_csv(folder / "rows.csv", index=False)
        return given | {"data": folder / "rows.csv", "target": "label", "client": "site"}
    if source == "frame":
        return given | {"data": frame, "target": "label", "client": "site"}
    from datasets import Dataset

    classes = (np.array(labels) == labels[0]).astype(int)
    table = Dataset.from_dict({"x": X, "label": classes, "site": clients})
    return {"data": table, "client": "site", "model": torch.nn.Linear(2, 2)}


@pytest.mark.parametrize("source", ["table", "frame", "arrays", "dataset"])
def test_every_loader_names_clients_that_look_alike(source: str, tmp_path: Path) -> None:
    sites = [("ward a", "ward  a", "ward b")[row % 3] for row in range(60)]
    with pytest.raises(DataError, match=r"data.client.*'ward  ?a' and 'ward  ?a'"):
        fedraclora.simulate(*QUIET, **brought(source, tmp_path, sites, LABELS))
    sites = [("a", "A", "b")[row % 3] for row in range(60)]
    run = fedraclora.simulate(*QUIET, **brought(source, tmp_path, sites, LABELS))
    assert run.builder.built.clients == 3
    assert "'A' and 'a'" in run.summary["task"]["similar_names"][0]


@pytest.mark.parametrize("source", ["table", "frame", "arrays"])
def test_every_loader_names_classes_that_look_alike(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sites = [f"site {row % 3}" for row in range(60)]
    labels = [str(label) for label in LABELS]
    inside = ["very  ill" if row % 2 else "very ill" for row in range(60)]
    with pytest.raises(DataError, match=r"data.label.*two classes"):
        fedraclora.simulate(*QUIET, **brought(source, tmp_path, sites, inside))
    labels[0] = "Ill " if source != "arrays" else "ILL"
    labels[1:3] = ["ill"] * 2
    caplog.set_level("INFO")
    fedraclora.simulate(
        *QUIET, "data.test_fraction=0.5", **brought(source, tmp_path, sites, labels)
    )
    assert "differ only in letter case" in caplog.text


def test_blanks_around_names_of_a_table_do_not_count(tmp_path: Path) -> None:
    sites = [("a", "a ", "b")[row % 3] for row in range(60)]
    labels = [f"{label} " if row % 2 else str(label) for row, label in enumerate(LABELS)]
    for source in ("table", "frame"):
        run = fedraclora.simulate(*QUIET, **brought(source, tmp_path, sites, labels))
        assert run.summary["task"]["partition"]["names"] == ["a", "b"]
        assert run.builder.built.task.reading["classes"] == ["ill", "well"]


def test_clients_of_a_dict_are_named_apart() -> None:
    tables = [(X[k::3], (X[k::3, 0] > 0).astype(int)) for k in range(3)]
    data = dict(zip(["a", "a ", "b"], tables, strict=True))
    with pytest.raises(DataError, match="'a' and 'a '"):
        fedraclora.simulate(*QUIET, model=torch.nn.Linear(2, 2), data=data)
