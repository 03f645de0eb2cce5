"""Load instruction files with answers, for causal language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np

from fedraclora.data.dataset import BY_COLUMN, TEXTS, DataSet
from fedraclora.data.encoders.chat import Chat
from fedraclora.data.encoders.conversations import Conversation, RowForm, read_conversations
from fedraclora.data.encoders.instructions import InstructionReader, SampleLength, Tokenizer
from fedraclora.data.locate import Root, check_file, resolve
from fedraclora.data.split import holdout_of
from fedraclora.limits import Count, Fraction, OneOf, limited
from fedraclora.rng import generator


@TEXTS
@BY_COLUMN.where(lambda it: it["test_file"] is None or it["packing"])
@limited("data")
def load_instructions(
    *,
    file: str | None = None,
    tokenizer: Tokenizer = None,
    root: Root = None,
    test_file: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    answers: Mapping[str, object] | None = None,
    choices: str | Sequence[str] | None = None,
    header: bool = True,
    client: str | int | None = None,
    template: str | None = None,
    max_length: SampleLength = 512,
    packing: bool = False,
    cut_away: Annotated[str, OneOf(("error", "drop"))] = "error",
    metrics: Sequence[str] | None = None,
    test_fraction: Fraction | None = None,
    split_seed: int = 0,
    subsample: Count | None = None,
    sha256: str | None = None,
    test_sha256: str | None = None,
) -> DataSet:
    """Load and tokenize conversations (.jsonl, .parquet, .csv or .tsv).

    Args:
        file: Training rows: a path (also relative to ``root``) or ``package:NAME/path``, with the
            columns ``messages``, or ``prompt`` and ``response``, or ``instruction``, ``input`` and
            ``output``.
        tokenizer: A folder, a GGUF file, ``package:NAME/path`` or ``hub:NAME``; only the last may
            download.
        root: The folder that paths may be relative to, or None.
        test_file: Test rows, or None to hold some of ``file`` out.
        prompt: A column, or a text with columns in braces; None: by the columns above.
        response: The same for the answer.
        answers: Texts for the values of ``response``, or None.
        choices: Possible answers, or the column that lists them, for evaluate.choices; None: the
            texts of ``answers``.
        header: Whether the first row of a .csv or .tsv names the columns; else 0, 1, ...
        client: The column of the natural client, or None.
        template: A Jinja chat template, or a file with one; None: the tokenizer's own.
        max_length: Tokens of a sample; longer conversations are cut, and counted.
        packing: Put several training conversations of a client (of any, without a column
            ``client``) into one sample.
        cut_away: Handling of a conversation whose response does not fit: error or drop.
        metrics: Names of metrics, the primary one first; None: perplexity, token_accuracy, loss.
        test_fraction: Fraction of the rows (of each client) held out; None: 0.2 without
            ``test_file``.
        split_seed: Seed of that split, and of ``subsample``.
        subsample: Training rows to draw, or None for all.
        sha256: SHA-256 of ``file``, or None.
        test_sha256: SHA-256 of ``test_file``, or None.

    Returns:
        Inputs ``input_ids`` and ``attention_mask`` (packed: ``position_ids``), int64 [N, T]; labels
        int64 [N, T], -100 outside answers. The number of outputs is that of the tokens.

    Raises:
        ConfigError: If a key is wrong, naming it, or there is no chat template.
        DataError: If a file or a tokenizer is missing, or a row cannot be used, naming it.
    """
    chat = Chat(tokenizer, root=root, template=template)
    texts = None if answers is None else {str(k): str(v) for k, v in answers.items()}
    owner = None if client is None else str(client)
    form = RowForm(prompt, response, texts, owner, choices=choices)
    reader = InstructionReader(form, header, chat, max_length, cut_away == "drop")

    def read(spelling: str, key: str, pin: str | None, form: RowForm) -> list[Conversation]:
        path = check_file(resolve(spelling, key=key, root=root), pin)
        return read_conversations(path, form, header=header)

    whole = read(str(file or ""), "data.file", sha256, form)
    everyone = np.array([str(one.client) for one in whole])
    holdout = holdout_of(test_fraction, split_seed, test_file=test_file)
    if holdout is None:
        held = read(str(test_file), "data.test_file", test_sha256, replace(form, client=None))
    else:
        # The same fraction of each client.
        owners = None if client is None else everyone
        kept, out = holdout.split(len(whole), labels=owners)
        whole, held = [whole[row] for row in kept], [whole[row] for row in out]
    if subsample is not None:
        drawn = generator(split_seed, "split", "subsample").permutation(len(whole))[:subsample]
        whole = [whole[row] for row in np.sort(drawn)]
    data = reader.data_set(whole, held, metrics, {"source": str(file)}, packing=packing)
    if client is None:
        return data
    columns = {str(client): data.columns["client"], **data.columns}
    return replace(data, columns=columns, clients=everyone)
