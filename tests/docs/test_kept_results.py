"""The kept tables are those of the runs that are kept beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedraclora.commands import RESULTS
from fedraclora.experiments.records import MAKERS, PACKED, keep_figures, shown_figures

TABLES = (".md", ".csv")


def tables(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.iterdir() if path.suffix in TABLES)
    return {path.name: path.read_bytes() for path in found if path.name != "README.md"}


@pytest.mark.slow  # together eight seconds; CI runs them
@pytest.mark.parametrize("name", MAKERS)
def test_tables_follow_from_their_runs(name: str, tmp_path: Path) -> None:
    MAKERS[name](RESULTS / name, tmp_path)
    assert tables(tmp_path) == tables(RESULTS / name)


def test_every_kept_table_is_held_to_its_runs() -> None:
    by_hand = {"deploy_round"}  # measured by the kernel's counters, outside the project
    assert {folder.name for folder in RESULTS.iterdir() if tables(folder)} == {*MAKERS} | by_hand


def test_kept_figures_are_those_that_pages_show() -> None:
    assert {*RESULTS.glob("*/*.png")} == shown_figures()


def test_kept_files_are_small() -> None:
    plain = [path for name in PACKED for path in RESULTS.glob(f"*/{name}")]
    assert not plain, "run python -m fedraclora.experiments.records"
    for path in RESULTS.glob("*/*.png"):
        with Image.open(path) as image:
            assert image.mode == "P", f"run python -m fedraclora.experiments.records: {path.name}"


def test_a_figure_keeps_its_pixels_in_few_colors(tmp_path: Path) -> None:
    pixels = np.zeros((40, 60, 4), dtype=np.uint8)
    pixels[10:20, :, 0], pixels[20:, :, 2], pixels[..., 3] = 200, 90, 255
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    keep_figures(tmp_path, {tmp_path / "a.png"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image.convert("RGBA")), pixels)
