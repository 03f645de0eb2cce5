"""Modules that a config names: found, or refused in words; no run starts in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

import fedraclora
from fedraclora.engines.ray.grid import Resident
from fedraclora.errors import ConfigError
from fedraclora.imports import import_object, refuse_run

SCRIPT = """
import fedraclora
def samples(client): ...
fedraclora.simulate("data=own", {"data": {"samples": "unguarded:samples"}}, clients=3)
"""
REFUSED = r"imports the module .*if __name__ == \"__main__\":"


def test_a_script_that_is_named_in_the_config_of_its_run_is_refused_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unguarded.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"^data.samples=unguarded:samples {REFUSED}"):
        fedraclora.simulate(
            "data=own", {"data": {"samples": "unguarded:samples"}}, clients=3, engine="ray"
        )
    refuse_run()  # it is over


def start_a_run(*_: object) -> Any:
    return fedraclora.simulate("data=digits", rounds=1)


def test_no_run_starts_where_a_ray_worker_takes_over_what_it_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    with pytest.raises(ConfigError, match=f"a Ray worker {REFUSED}"):
        Resident(start_a_run, [None])


def test_main_is_another_program_in_each_process() -> None:
    with pytest.raises(ConfigError, match="elsewhere: __main__ is another"):
        import_object("data.loss", "__main__:elsewhere")
