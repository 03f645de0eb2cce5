"""What all tests share: one thread, reproducible examples, the data root, golden curves."""

from __future__ import annotations

import gc
import inspect
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from absl import logging as absl_logging
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

import composing
import drawing

from fedraclora.experiments.hosts import Bed, why_not

# Nothing of what is imported and collected is garbage, and to look through it is half the work.
gc.disable()

# Nothing here waits for the disk: what is killed or loses power is a process of its own, or a test
# puts its own in this place.
os.fsync = lambda _: None

# One thread fixes the order of the sums inside a matrix product, and small tensors run faster.
torch.set_num_threads(1)

# The accountant's library logs through absl, whose handler closes its stream when Hydra resets
# logging, unless that is the process's own. Here it would be pytest's, and every later test fail.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

# Some test leaves a handler of logging behind that cannot write any more, which is told on stderr:
# tests that hold what is printed there failed by the order of modules.
logging.raiseExceptions = False

# Ray runs workers at the lowest priority but four: beside other tests they would wait for minutes.
os.environ.setdefault("RAY_worker_niceness", "0")

# The same examples in each run: a failure can be repeated, a timed limit would be luck.
settings.register_profile("dev", max_examples=25, derandomize=True, deadline=None)
settings.register_profile("ci", max_examples=100, derandomize=True, deadline=None, print_blob=True)
settings.load_profile("dev")

DATA_VARIABLE = "FEDRACLORA_DATA"
GOLDEN_RTOL = 1e-6

Golden = Callable[[str, Mapping[str, Sequence[float]]], None]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for garbage from the end of the collection on, among what tests make."""
    try:
        return (yield)
    finally:
        gc.freeze()
        # It is looked through seldom: tests end with little garbage, and looking took 7 % of them.
        gc.set_threshold(20_000, 10, 100)
        gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switches of `make golden` and `make test-all`."""
    parser.addoption(
        "--write-golden", action="store_true", help="write tests/golden/*.json instead of comparing"
    )
    parser.addoption(
        "--as-users",
        action="store_true",
        help="compose each config anew and paint each figure, as users' commands do",
    )


def heed_signals() -> None:
    """Undo what a shell (``&``) and ``nohup`` ignore: processes under test would inherit it.

    The tests themselves still outlive a hangup.
    """
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Set up this process.

    Hydra remembers our own configs, and figures are left blank, unless that is switched off.
    """
    heed_signals()
    if not config.getoption("--as-users"):
        composing.install()
        drawing.install()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark as long the parameters of a test that its mark `short` does not keep."""
    if (mark := item.get_closest_marker("short")) and isinstance(item, pytest.Function):
        when = mark.kwargs["when"]
        named = {n: item.callspec.params[n] for n in inspect.signature(when).parameters}
        if not when(**named):
            item.add_marker(pytest.mark.long)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture
def painted() -> Iterator[None]:
    """Paint figures, for a test that looks at them."""
    with drawing.painting():
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the larger data sets, from FEDRACLORA_DATA; the test is skipped when unset."""
    root = os.environ.get(DATA_VARIABLE)
    if not root:
        pytest.skip(f"{DATA_VARIABLE} is not set: it names the folder of the larger data sets")
    if not Path(root).is_dir():
        pytest.fail(f"{DATA_VARIABLE}={root} is no folder")
    return Path(root)


@pytest.fixture(scope="session")
def beds() -> type[Bed]:
    """Beds of hosts, as `with beds(3) as bed`; the test is skipped where none is to be had."""
    if reason := why_not():
        pytest.skip(reason)
    return Bed


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare named curves with tests/golden/<name>.json, or write it under --write-golden.

    The comparison is to rtol 1e-6: loose enough for another build of torch, tight enough that
    a changed update rule cannot hide.
    """
    folder = Path(__file__).parent / "golden"
    write = bool(request.config.getoption("--write-golden"))

    def check(name: str, curves: Mapping[str, Sequence[float]]) -> None:
        file = folder / f"{name}.json"
        found = {key: [float(v) for v in values] for key, values in curves.items()}
        assert all(math.isfinite(v) for values in found.values() for v in values)
        if write:
            file.write_text(json.dumps(found, indent=1) + "\n")
            return
        if not file.is_file():
            pytest.fail(f"{file.name} is missing: write it with `make golden` and read it")
        wanted = json.loads(file.read_text())
        assert found.keys() == wanted.keys()
        for key, values in found.items():
            assert values == pytest.approx(wanted[key], rel=GOLDEN_RTOL), key

    return check
