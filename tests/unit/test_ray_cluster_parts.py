"""What travels to a cluster of several hosts, which one it is, and how many workers it holds."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

from fedraclora.config.settings import RayConfig
from fedraclora.engines.ray import grid, packages
from fedraclora.engines.ray.cluster import (
    Cluster,
    ImportPathGuard,
    address_of,
    check_address,
    folder_digest,
)
from fedraclora.errors import ConfigError, EngineError

MODULE = "of_a_user"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's with a module that is imported, one that is not, and what is no code."""
    for name in (f"{MODULE}.py", "later.py", "inner/vocabulary.json", "runs/1/weights.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"NAME = {name!r}")
    for name in (".git/HEAD", ".venv/x.py", "__pycache__/later.pyc", "data/train.bin", "big.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(7))
    (tmp_path / ".rayignore").write_text("big.bin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__(MODULE)
    monkeypatch.delitem(sys.modules, "__mp_main__", raising=False)
    yield tmp_path  # type: ignore[misc]
    del sys.modules[MODULE]


def content(folder: Path, why: str = MODULE) -> dict[str, bytes]:
    """Unpack the package of a folder."""
    with zipfile.ZipFile(io.BytesIO(packages._packed(folder, why))) as package:
        return {name: package.read(name) for name in package.namelist()}


def test_the_folder_of_an_imported_module_travels_with_what_is_beside_it(folder: Path) -> None:
    assert packages._user_folders()[folder] == MODULE
    assert content(folder) == {
        name: (folder / name).read_bytes()
        for name in (f"{MODULE}.py", "later.py", "inner/vocabulary.json")
    }


def test_a_package_is_not_taken_for_outputs_of_the_same_name(folder: Path) -> None:
    (folder / "data/__init__.py").write_text("")
    assert "data/train.bin" in content(folder)


def test_the_project_travels_under_its_name_through_its_links() -> None:
    found = content(Path(packages.__file__).parents[2], packages.PROJECT)
    named = {"fedraclora/engines/ray/packages.py", "fedraclora/strategies/base.py"}
    assert named <= {*found}
    assert not [n for n in found if not n.startswith("fedraclora/") or "results/" in n]
    assert not [n for n in found if n.endswith(".pyc")]


def test_the_same_content_is_the_same_package(folder: Path) -> None:
    first = packages._packed(folder, MODULE)
    (folder / "later.py").touch()
    assert packages._packed(folder, MODULE) == first
    (folder / "later.py").write_text("NAME = 0")
    assert packages._packed(folder, MODULE) != first


def test_what_is_too_large_is_refused_before_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (folder / "set.bin").open("wb") as file:
        file.truncate(2 * packages.LARGEST)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
    with pytest.raises(ConfigError, match=rf"{MODULE}.*{folder}.*64 MB.*rayignore"):
        packages._packed(folder, MODULE)


def test_what_this_process_runs_is_known_by_digest(folder: Path) -> None:
    before = packages.loaded_code()
    assert before[MODULE][1] == str(folder / f"{MODULE}.py")
    assert before["fedraclora.engines.ray.packages"][1] == packages.__file__
    assert not {"ray", "torch", "pytest", "__main__"} & {*before}
    (folder / f"{MODULE}.py").write_text("NAME = 1")
    after = packages.loaded_code()
    assert {name for name in after if after[name] != before.get(name)} == {MODULE}


@pytest.mark.parametrize(
    ("said", "around", "wanted"),
    [
        (None, None, (None, "engine.address")),
        (None, "10.0.0.1:6379", ("10.0.0.1:6379", "RAY_ADDRESS")),
        ("local", "10.0.0.1:6379", (None, "engine.address")),
        (None, "local", (None, "RAY_ADDRESS")),
        ("auto", "10.0.0.1:6379", ("auto", "engine.address")),
        (None, "", (None, "engine.address")),
    ],
)
def test_an_address_is_that_of_the_config_else_of_the_environment(
    said: str | None,
    around: str | None,
    wanted: tuple[str | None, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if around is not None:
        monkeypatch.setenv("RAY_ADDRESS", around)
    assert address_of(RayConfig(address=said)) == wanted


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "http://10.0.0.1:8265"])
def test_an_address_for_drivers_outside_is_refused_with_what_to_do(address: str) -> None:
    with pytest.raises(ConfigError, match=rf"RAY_ADDRESS='{address}'.*ray job submit"):
        check_address(address, "RAY_ADDRESS")


def cluster(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, float]],
    device: str = "cpu",
    free: dict[str, float] | None = None,
    **said: Any,
) -> Cluster:
    """A cluster of these machines, as Ray tells of it."""
    found = [
        {"Alive": True, "NodeID": f"{k}", "NodeManagerAddress": f"10.0.0.{k}", "Resources": node}
        for k, node in enumerate(nodes)
    ]
    dead = {**found[0], "Alive": False}
    monkeypatch.setattr(ray, "nodes", lambda: [*found, dead])
    total = {key: sum(n.get(key, 0) for n in nodes) for key in ("CPU", "GPU")}
    monkeypatch.setattr(ray, "available_resources", lambda: total if free is None else free)
    monkeypatch.setattr("fedraclora.engines.ray.cluster.SETTLING", 0.0)
    made = object.__new__(Cluster)
    made.settings, made.device = RayConfig(**said), device
    made.gpus = float(device == "cuda") if said.get("gpus") is None else said["gpus"]
    made.hosts = made._hosts()
    return made


@pytest.mark.parametrize(
    ("device", "gpus", "wanted"),
    [("cpu", None, [1, 3, 8]), ("cuda", None, [0, 3, 0]), ("cuda", 0.1, [0, 3, 5])],
)
def test_a_worker_needs_its_core_and_its_share_of_a_gpu_on_one_host(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: float | None, wanted: list[int]
) -> None:
    nodes = [{"CPU": 1.5}, {"CPU": 3, "GPU": 4}, {"CPU": 8, "GPU": 0.5}]
    made = cluster(monkeypatch, nodes, device, gpus=gpus)
    assert [host.room for host in made.hosts] == wanted
    assert made._count() == sum(wanted)
    with pytest.raises(ConfigError, match=f"enough for {sum(wanted)}"):
        cluster(monkeypatch, nodes, device, gpus=gpus, workers=sum(wanted) + 1)._count()


def test_a_cluster_without_its_token_is_left_before_ray_asks_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(address: str) -> None:
        raise AuthenticationError(f"no token for {address}")

    monkeypatch.setattr("fedraclora.engines.ray.cluster.check_address", lambda *_: None)
    monkeypatch.setattr("fedraclora.engines.ray.cluster.GcsClient", refuse)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("asked"))
    with pytest.raises(EngineError, match=r"10\.0\.0\.1:6379.*no token.*Check engine\.address"):
        Cluster(RayConfig(address="10.0.0.1:6379"), "cpu")


def test_ray_is_given_an_ip_address(monkeypatch: pytest.MonkeyPatch) -> None:
    found, lookup = [], "fedraclora.engines.ray.cluster.socket.gethostbyname"
    monkeypatch.setattr("fedraclora.engines.ray.cluster.check_address", lambda *_: None)
    monkeypatch.setattr("fedraclora.engines.ray.cluster.GcsClient", found.append)
    monkeypatch.setattr(ray, "init", lambda **named: found.append(named["address"]) or 1 / 0)
    monkeypatch.setattr(lookup, {"head": "10.0.0.7"}.__getitem__)
    with pytest.raises(EngineError):
        Cluster(RayConfig(address="head:6379"), "cpu")
    assert found == ["10.0.0.7:6379", "10.0.0.7:6379"]


def test_room_grows_with_hosts_that_join(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cluster(monkeypatch, nodes := [{"CPU": 1}, {"CPU": 2}])
    assert made.room() == 3
    assert made.new_machines() == []
    cluster(monkeypatch, [*nodes, {"CPU": 4}])
    assert made.room() == 7
    assert [(host.address, host.room) for host in made.new_machines()] == [("10.0.0.2", 4)]
    assert made.new_machines() == []


def test_what_others_use_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 4}, {"CPU": 4}]
    assert cluster(monkeypatch, nodes, free={"CPU": 3.5})._count() == 3
    assert cluster(monkeypatch, nodes, free={})._count() == 8  # it waits for them
    assert cluster(monkeypatch, nodes, free={"CPU": 3.5}, workers=6)._count() == 6


def test_workers_that_ask_for_no_gpu_are_not_put_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = cluster(monkeypatch, [{"CPU": 4, "GPU": 1}, {"CPU": 4}], "cuda", gpus=0)
    with pytest.raises(ConfigError, match=r"engine.gpus=0.*10\.0\.0\.1 has no GPU"):
        made._count()


def test_files_of_a_folder_are_told_apart_by_their_content(tmp_path: Path) -> None:
    assert folder_digest(str(tmp_path / "none")) == {}
    (tmp_path / "0.npz").write_bytes(b"one")
    before = folder_digest(str(tmp_path))
    (tmp_path / "0.npz").write_bytes(b"two")
    assert {*before} == {*folder_digest(str(tmp_path))}
    assert before != folder_digest(str(tmp_path))


def test_no_folder_of_this_machine_is_put_first_on_paths_elsewhere() -> None:
    job = JobConfig(_py_driver_sys_path=ImportPathGuard([""]))
    job._py_driver_sys_path.extend(["/a", "/b"])  # as ray.init does
    assert job._py_driver_sys_path == []


def test_workers_of_this_machine_import_the_code_of_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    made = cluster(monkeypatch, [{"CPU": 1}], threads=2)
    made._code = None
    found = made.runtime_env()["env_vars"]
    assert found["OMP_NUM_THREADS"] == "2"
    paths = found["PYTHONPATH"].split(os.pathsep)
    assert str(Path(packages.__file__).parents[3]) in paths
    assert "/elsewhere" in paths


def test_workers_elsewhere_get_no_path_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    job = SimpleNamespace(runtime_env={"py_modules": ["gcs://of_the_job.zip"]})
    here: dict[str, bytes] = {"gcs://lost.zip": b"1"}
    monkeypatch.setattr(packages, "pin_runtime_env_uri", lambda uri: None)
    monkeypatch.setattr(packages, "package_exists", here.__contains__)
    monkeypatch.setattr(packages, "upload_package_to_gcs", here.__setitem__)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: job)
    made = cluster(monkeypatch, [{"CPU": 1}])
    made._code = packages.CodePackages()
    found = made.runtime_env()
    assert "PYTHONPATH" not in found["env_vars"]
    *own, of_the_job = found["py_modules"]
    assert of_the_job == "gcs://of_the_job.zip"
    assert {*own} | {"gcs://lost.zip"} == {*here}
    del here[own[0]]  # as Ray does after some minutes
    assert made.runtime_env() == found
    assert own[0] in here


def test_workers_that_join_later_are_counted_with_those_of_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    own = grid.facts() | {"node": "here", "code": {}, "mark": "7"}
    there = object.__new__(grid.RayGrid)
    there._admitted = []
    cluster = SimpleNamespace(facts={"cluster": "10.0.0.1:6379"})
    monkeypatch.setattr(there, "cluster", cluster, raising=False)
    there._check([own])
    there._check([own | {"address": "10.0.0.2"}] * 3)
    assert there.facts["workers"] == "4: 3 on 10.0.0.2, 1 on 10.0.0.1"
