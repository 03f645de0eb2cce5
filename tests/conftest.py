"""What all tests share: one thread, reproducible examples, the data root, golden curves."""

from __future__ import annotations

import gc
import inspect
import json
import math
import os
import pickle
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from absl import logging as absl_logging
from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra._internal.hydra import Hydra
from hydra.core.default_element import InputDefault
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from hypothesis import settings
from omegaconf import DictConfig

from experiments import CONF

# Nothing of what is imported and collected is garbage, and to look through it is half the work.
gc.disable()

# One thread fixes the order of the sums inside a matrix product, and small tensors run faster.
torch.set_num_threads(1)

# The accountant's library logs through absl, whose handler closes its stream when Hydra resets
# logging, unless that is the process's own. Here it would be pytest's, and every later test fail.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

# Ray runs workers at the lowest priority but four: beside other tests they would wait for minutes.
os.environ.setdefault("RAY_worker_niceness", "0")

# The same examples in each run: a failure can be repeated, a timed limit would be luck.
settings.register_profile("dev", max_examples=25, derandomize=True, deadline=None)
settings.register_profile("ci", max_examples=100, derandomize=True, deadline=None, print_blob=True)
settings.load_profile("dev")

load_config = ConfigRepository.load_config
# Where Hydra looks, and the name of a file there -> what it holds, pickled: a copy takes a quarter
# of the time that `copy.deepcopy` does.
files: dict[tuple[str, ...], bytes] = {}


def remembered(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    """Read a file of Hydra's or of ours once in a process: each command composes thirty."""
    places = [source.path for source in self.get_sources() if source.scheme() == "file"]
    if places != [str(CONF)]:  # a test's own folder, too
        return load_config(self, config_path)
    key = (*(source.full_path() for source in self.get_sources()), config_path)
    if key not in files:
        files[key] = pickle.dumps(load_config(self, config_path))
    found: ConfigResult | None = pickle.loads(files[key])
    return found


ConfigRepository.load_config = remembered  # type: ignore[method-assign]

get_mode = Hydra.get_mode


def mode_of(self: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
    """Tell ``hydra.mode``, for which Hydra composes all once more; no file of ours sets it."""
    places = [source.path for source in self.config_loader.get_sources()]
    theirs = {path for path in places if path.startswith("/")} - {str(CONF)}
    if theirs or any("hydra." in word for word in overrides):
        mode: RunMode | None = get_mode(self, config_name, overrides)
        return mode
    return None


Hydra.get_mode = mode_of  # type: ignore[method-assign]

interpolation_map = defaults_list._create_interpolation_map


def map_where_read(
    overrides: Overrides, defaults: list[InputDefault], self_added: bool
) -> DictConfig | None:
    """Map the choices for ``${...}`` in a list of defaults, where one is read: it is slow."""
    if not any(entry.is_interpolation() for entry in defaults):
        return None
    return interpolation_map(overrides, defaults, self_added)


defaults_list._create_interpolation_map = map_where_read  # type: ignore[assignment]

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
        gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch of `make golden`."""
    parser.addoption(
        "--write-golden", action="store_true", help="write tests/golden/*.json instead of comparing"
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark as slow the parameters of a test that its mark `short` does not keep."""
    if (mark := item.get_closest_marker("short")) and isinstance(item, pytest.Function):
        when = mark.kwargs["when"]
        named = {n: item.callspec.params[n] for n in inspect.signature(when).parameters}
        if not when(**named):
            item.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


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
