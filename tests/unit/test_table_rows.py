"""A row of a table is checked when the config is read, and called when the data are."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from fedraclora.config.table_rows import TableRow, selection_of
from fedraclora.errors import ConfigError
from fedraclora.models import BuiltModel

MLP: dict[str, object] = {"name": "mlp", "hidden": [3]}


def test_a_row_is_called_with_what_only_a_run_knows() -> None:
    row: TableRow[BuiltModel] = TableRow.checked("model", MLP)
    assert (row.name, row.get("hidden"), row.get("root")) == ("mlp", [3], None)
    built = pickle.loads(pickle.dumps(row))(shape=(5,), classes=2, seed=0)
    assert [tuple(p.shape) for p in built.model.parameters()] == [(3, 5), (3,), (2, 3), (2,)]


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (MLP | {"name": "mpl"}, "mpl.*mlp"),
        (MLP | {"hiden": [3]}, r"model\.hiden.*model\.hidden"),
        (MLP | {"hidden": "three"}, r"model\.hidden"),
    ],
)
def test_a_wrong_name_key_or_value_is_refused_before_data_are_read(
    group: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        TableRow.checked("model", group)


def test_keys_beside_a_row_are_what_is_taken_of_the_data() -> None:
    row: TableRow[Any] = TableRow.checked("data", {"name": "digits", "validation": 0.25})
    assert selection_of(row).validation == 0.25
    assert "validation" not in row.defaults
    assert selection_of(TableRow("data", {"name": "digits"})).labels is None
