"""Two GLUE tasks as questions with one-word answers, for language models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedraclora.data.dataset import TEXTS, DataSet
from fedraclora.data.encoders.chat import Chat
from fedraclora.data.encoders.conversations import Conversation, RowForm, read_conversations
from fedraclora.data.encoders.instructions import (
    ANSWER_METRICS,
    InstructionReader,
    SampleLength,
    Tokenizer,
)
from fedraclora.data.locate import Root, check_file, resolve
from fedraclora.errors import ConfigError, unknown
from fedraclora.limits import Count, limited
from fedraclora.rng import generator


@dataclass(frozen=True)
class GlueTask:
    """Define a task as a question.

    Attributes:
        folder: Folder of its two files, under ``glue`` in the data root.
        header: Whether their first row names the columns.
        form: How a row becomes a question with its answer; its ``client`` is the source, or None.
        sha256: SHA-256 of the training rows, and of the development rows, which are the test.
    """

    folder: str
    header: bool
    form: RowForm
    sha256: tuple[str, str]


TASKS = {
    "sst2": GlueTask(
        "SST-2",
        True,
        RowForm(
            "Is this film review positive or negative? Answer with one word.\n{sentence}",
            "label",
            {"0": "negative", "1": "positive"},
        ),
        (
            "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1",
            "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0",
        ),
    ),
    "cola": GlueTask(
        "CoLA",
        False,
        RowForm(
            "Is this sentence grammatical? Answer with yes or no.\n{3}",
            "1",
            {"0": "no", "1": "yes"},
            "0",
        ),
        (
            "cb368ebeb9f27d7ad03720d27ddc95687a311bdb100781a2fe59a5f5b1bc0624",
            "8c013e21dc39957cac37378d87bebe225b694a0d5fe13eded66c2856628833fd",
        ),
    ),
}


@TEXTS
@limited("data")
def load_glue_instructions(
    *,
    tokenizer: Tokenizer = None,
    root: Root = None,
    tasks: Sequence[str] = ("sst2", "cola"),
    clients_per_task: Count = 4,
    rows: Count = 400,
    test_rows: Count = 100,
    split_seed: int = 0,
    template: str | None = None,
    max_length: SampleLength = 128,
    packing: bool = False,
    metrics: Sequence[str] = ANSWER_METRICS,
) -> DataSet:
    """Load SST-2 and CoLA from their TSV files as conversations.

    A client has one task: the largest sources of CoLA are its clients; the reviews of SST-2, which
    have no source, are divided at random.

    Args:
        tokenizer: A folder, a GGUF file, ``package:NAME/path`` or ``hub:NAME``; only the last may
            download.
        root: The data root, which has the folder ``glue``.
        tasks: Keys of `TASKS`.
        clients_per_task: Clients of each task.
        rows: Most training rows of a client, drawn at random.
        test_rows: Test rows of each task, drawn from its development set.
        split_seed: Seed of these draws.
        template: See `load_instructions`, as for the rest.
        max_length: Tokens of a sample.
        packing: Put several conversations of a client into one sample.
        metrics: Names of metrics, the primary one first.

    Returns:
        See `load_instructions`; the column ``client`` is ``TASK: source``.

    Raises:
        ConfigError: If a key is wrong, naming it.
        DataError: If a file is missing, or its checksum differs.

    References:
        Wang et al., *GLUE*, ICLR 2019, arXiv 1804.07461.
    """
    chat = Chat(tokenizer, root=root, template=template)
    reader = InstructionReader(RowForm(), header=True, chat=chat, max_length=max_length, drop=False)
    train: list[Conversation] = []
    test: list[Conversation] = []
    for name in tasks:
        if name not in TASKS:
            raise unknown("data.tasks", name, TASKS)
        whole, held = (_read(TASKS[name], place, root) for place in (0, 1))
        train += _dealt(name, whole, clients_per_task, rows, split_seed)
        drawn = generator(split_seed, "split", "test", name).permutation(len(held))[:test_rows]
        test += [replace(held[row], client=None) for row in np.sort(drawn)]
    info: dict[str, object] = {"source": "glue", "tasks": [*tasks]}
    return reader.data_set(train, test, metrics, info, packing=packing)


def _read(task: GlueTask, place: int, root: str | None) -> list[Conversation]:
    spelling = f"glue/{task.folder}/{('train', 'dev')[place]}.tsv"
    path = check_file(resolve(spelling, key="data.root", root=root), task.sha256[place])
    return read_conversations(path, task.form, header=task.header)


def _dealt(
    name: str, whole: list[Conversation], clients: int, rows: int, split_seed: int
) -> list[Conversation]:
    """Return the conversations of each client of a task, in the order of the file."""
    drawn = generator(split_seed, "split", "train", name).permutation(len(whole))
    sources = [one.client for one in whole]
    if sources[0] is None:  # dealt out in turn, like cards
        owners = np.empty(len(whole), dtype=np.int64)
        owners[drawn] = np.arange(len(whole)) % clients
        wanted = [str(part) for part in range(clients)]
        sources = [str(part) for part in owners]
    else:
        names, counts = np.unique(np.array(sources), return_counts=True)
        if len(names) < clients:
            raise ConfigError(
                f"data.clients_per_task={clients}, but {name} has {len(names)} sources"
            )
        wanted = names[np.argsort(-counts, kind="stable")[:clients]].tolist()
    taken: list[int] = []
    for source in wanted:
        taken += [row for row in drawn if sources[row] == source][:rows]
    return [replace(whole[row], client=f"{name}: {sources[row]}") for row in sorted(taken)]
