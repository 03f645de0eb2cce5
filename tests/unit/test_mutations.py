"""The defects that the contract suite must find can still be planted, each in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.mutations import EVERY, ROOT, failures, planted
from experiments.mutations.defects import Defect

every_defect = pytest.mark.parametrize("defect", EVERY, ids=lambda d: d.name)


@every_defect
def test_what_a_defect_changes_stands_there_once(defect: Defect) -> None:
    text = (ROOT / defect.file).read_text()
    for old, new in defect.changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    compile(text, defect.file, "exec")


def test_names_are_unique() -> None:
    assert len({d.name for d in EVERY}) == len(EVERY)


@pytest.mark.slow
@every_defect
def test_the_contract_suite_finds_it(defect: Defect, tmp_path: Path) -> None:
    planted(defect, tmp_path)
    assert failures(defect, tmp_path)


def test_a_text_that_is_not_there_is_refused(tmp_path: Path) -> None:
    gone = Defect("gone", "fedraclora/tree.py", "this is not there", "", "fedavg", "nowhere")
    with pytest.raises(ValueError, match="stands 0 times"):
        planted(gone, tmp_path)
