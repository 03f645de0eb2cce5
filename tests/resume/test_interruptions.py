"""Whatever a run has and however it stops, it resumes to the bits of the run that never stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from fedraclora.rng import generator
from fedraclora.run.ledger import digest_rows, read_ledger
from fedraclora.weights.links import read_links
from tests.common import summary_of
from tests.resume.features import FEATURES
from tests.resume.stops import STOPS, Killed, Reaper, Stop, reaping

Whole = Callable[[str], tuple[tuple[object, ...], list[str]]]
# Each feature is stopped in one way, and each way by a seventh of the features.
QUICK = {(name, STOPS[k % len(STOPS)]) for k, name in enumerate(FEATURES)}
short = pytest.mark.short(when=lambda name, stop: (name, stop) in QUICK)


@pytest.fixture(autouse=True, scope="module")
def one_key() -> Iterator[None]:
    """One key for all runs, which are held to each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "urandom", lambda count: bytes(range(count)))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """How a run ends that nothing stopped, and what it does to the disk."""

    # The first run of a process makes folders of libraries besides.
    FEATURES["carried"].run(tmp_path_factory.mktemp("first") / "run")

    @cache
    def give(name: str) -> tuple[tuple[object, ...], list[str]]:
        folder, reaper = tmp_path_factory.mktemp("whole") / "run", Reaper()
        with reaping(reaper):
            FEATURES[name].run(folder)
        return end_of(folder), reaper.calls

    return give


def end_of(folder: Path) -> tuple[object, ...]:
    """What must come out the same: weights, ledger, and every link of the chain."""
    summary = summary_of(folder)
    chain = [
        (round_, meta, {n: t.tolist() for n, t in tensors.items()})
        for round_, tensors, meta in read_links(folder / "chain")
    ]
    rows = digest_rows(read_ledger(folder / "ledger.jsonl"))
    assert rows == summary["ledger_digest"]
    return summary["weights_digest"], rows, chain


@pytest.mark.slow
@short
@pytest.mark.parametrize(("name", "stop"), list(product(FEATURES, STOPS)))
def test_a_run_resumes_to_the_same_bits(
    name: str, stop: Stop, whole: Whole, tmp_path: Path
) -> None:
    wanted, calls = whole(name)
    folder = tmp_path / "run"
    stop(lambda: FEATURES[name].run(folder), len(calls))
    FEATURES[name].run(folder)
    assert end_of(folder) == wanted


@pytest.mark.long
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("name", ["carried", "moments", "noise", "scaled bits of a pool"])
def test_a_run_may_be_killed_at_any_write(
    name: str, torn: bool, whole: Whole, tmp_path: Path
) -> None:
    wanted, calls = whole(name)
    assert len(calls) > 40
    wrong = []
    for at, call in enumerate(calls, start=1):
        folder = tmp_path / f"{at}"
        with reaping(Reaper(at, torn)), pytest.raises(Killed):
            FEATURES[name].run(folder)
        try:
            FEATURES[name].run(folder)
            if end_of(folder) != wanted:
                wrong.append(f"killed at {call} ({at}): another result")
        except Exception as error:  # every window is wanted, not the first
            wrong.append(f"killed at {call} ({at}): {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_a_run_may_be_killed_again_while_it_resumes(whole: Whole, tmp_path: Path) -> None:
    wanted, _ = whole("carried")
    rng = generator(0, "kills")
    for trial in range(12):
        folder = tmp_path / f"{trial}"
        for _ in range(4):
            reaper = Reaper(int(rng.integers(1, 50)), bool(rng.integers(2)))
            with reaping(reaper):
                try:
                    FEATURES["carried"].run(folder)
                    break
                except Killed:
                    continue
        FEATURES["carried"].run(folder)
        assert end_of(folder) == wanted, trial
