"""Jobs on resident workers: any order, every loss mended or named, nobody waited for in vain."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.exceptions import ObjectLostError

from fedraclora.config.settings import RayConfig
from fedraclora.engines.ray.cluster import Cluster, check_address
from fedraclora.engines.ray.pool import WorkerPool, WorkerSlot
from fedraclora.engines.ray.pulse import check_response, places_of
from fedraclora.errors import ConfigError, EngineError

pytestmark = pytest.mark.long

# Workers cannot import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(RayConfig(workers=2), "cpu")
    yield cluster
    cluster.close()
    assert not ray.is_initialized()


class Toy:
    """Doubles a number; dies or hangs the first time it meets one of its bad jobs."""

    def __init__(self, marks: str, start: str = "") -> None:
        self.marks = Path(marks)
        if start == "die" and self._first("start"):
            os._exit(1)
        if start == "raise":
            raise ModuleNotFoundError("No module named 'fedraclora'")

    def _first(self, name: str) -> bool:
        try:
            (self.marks / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def facts(self) -> dict[str, str]:
        return {"pid": str(os.getpid())}

    def double(self, job: str) -> str:
        kind, _, number = job.partition(" ")
        if kind == "die" and self._first(number):
            os._exit(1)
        if kind == "die always":
            os._exit(1)
        if kind == "hang" and self._first(number):
            time.sleep(60)
        if kind == "raise":
            raise ValueError("no")
        return f"{2 * int(number)}"


def pool_of(
    tmp_path: Path, cluster: Cluster, *, retries: int = 3, timeout: float = 30.0
) -> WorkerPool:
    kind = ray.remote(Toy).options(num_cpus=1)
    return WorkerPool(lambda: kind.remote(str(tmp_path)), cluster.workers, retries, timeout)


def submit(slot: WorkerSlot, job: str) -> Any:
    return slot.actor.double.remote(job)


def done(pool: WorkerPool, jobs: list[str]) -> dict[str, str]:
    return {job: answer for job, _, answer in pool.run(jobs, submit)}


def test_every_job_is_done_once(tmp_path: Path, cluster: Cluster) -> None:
    pool = pool_of(tmp_path, cluster)
    assert len({facts["pid"] for facts in pool.facts()}) == 2
    places = places_of(pool.slots[0].actor)
    assert len({*places}) == 2  # its own, and that of the raylet
    assert all(check_response(*place, 60.0) < 60 for place in places)
    answers = [job for job, _, _ in pool.run([f"ok {i}" for i in range(9)], submit)]
    assert sorted(answers) == [f"ok {i}" for i in range(9)]
    assert pool.incidents == []
    pool.close()


def test_jobs_of_workers_that_die_or_hang_are_run_again(tmp_path: Path, cluster: Cluster) -> None:
    pool = pool_of(tmp_path, cluster, timeout=4.0)
    pids = {facts["pid"] for facts in pool.facts()}
    found = done(pool, ["ok 1", "die 2", "ok 3", "hang 4", "ok 5"])
    assert found == {"ok 1": "2", "die 2": "4", "ok 3": "6", "hang 4": "8", "ok 5": "10"}
    assert len(pool.incidents) == 2
    assert any("was lost" in i and "die 2 was run again" in i for i in pool.incidents)
    assert any("did not answer within 4 s; hang 4" in i for i in pool.incidents)
    assert pids.isdisjoint({facts["pid"] for facts in pool.facts()}) or len(pids) == 2
    pool.close()


def test_a_job_that_kills_every_worker_ends_the_run(tmp_path: Path, cluster: Cluster) -> None:
    pool = pool_of(tmp_path, cluster, retries=0)
    with pytest.raises(EngineError, match=r"engine.retries=0: worker \d was lost.*\(die 7\)"):
        done(pool, ["die 7"])
    pool.close()


def test_a_worker_that_raises_ends_the_run_with_its_words(tmp_path: Path, cluster: Cluster) -> None:
    pool = pool_of(tmp_path, cluster)
    with pytest.raises(EngineError, match=r"worker \d .*raise 7: ValueError: no$"):
        done(pool, ["raise 7"])
    assert pool.incidents == []
    pool.close()


def test_an_answer_that_was_lost_with_its_node_is_made_again(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(tmp_path, cluster)
    pool.facts()
    get, lost = ray.get, []

    def once_lost(ref: Any) -> object:
        if not lost:
            lost.append(ref)
            raise ObjectLostError(ref.hex(), ray.ObjectRef.nil(), "")
        return get(ref)

    monkeypatch.setattr(ray, "get", once_lost)
    assert done(pool, ["ok 1"]) == {"ok 1": "2"}
    assert len(lost) == len(pool.incidents) == 1
    pool.close()


def test_a_stopped_worker_is_noticed_and_comes_back(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedraclora.engines.ray.pulse.QUIET", 1.5)
    pool = pool_of(tmp_path, cluster)
    pids = [int(facts["pid"]) for facts in pool.facts()]
    pool.check = lambda _: None
    os.kill(pids[1], signal.SIGSTOP)
    try:
        assert done(pool, ["ok 1", "ok 2", "ok 3"]) == {"ok 1": "2", "ok 2": "4", "ok 3": "6"}
    finally:
        os.kill(pids[1], signal.SIGCONT)
    assert any("worker 1 has been silent" in told for told in pool.incidents)
    end = time.monotonic() + 60
    while "worker 1 answers again" not in pool.incidents:
        assert time.monotonic() < end
        done(pool, ["ok 1"])
        time.sleep(0.5)
    assert [int(facts["pid"]) for facts in pool.facts()] == pids
    pool.close()


def test_a_run_that_is_interrupted_starts_no_worker(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    pool = pool_of(tmp_path, cluster)
    actors = [slot.actor for slot in pool.slots]
    monkeypatch.setattr(ray, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        done(pool, ["ok 1", "ok 2"])
    assert [slot.actor for slot in pool.slots] == actors
    assert pool.incidents == []
    pool.close()


def test_a_worker_that_dies_at_its_start_is_replaced(tmp_path: Path, cluster: Cluster) -> None:
    kind = ray.remote(Toy).options(num_cpus=1)
    pool = WorkerPool(lambda: kind.remote(str(tmp_path), "die"), 1, 1, 30.0)
    assert len(pool.facts()) == 1
    assert "its start was run again" in pool.incidents[0]
    pool.close()


def test_a_worker_that_cannot_start_is_named(cluster: Cluster) -> None:
    kind = ray.remote(Toy).options(num_cpus=1)
    pool = WorkerPool(lambda: kind.remote("", "raise"), 1, 3, 30.0)
    with pytest.raises(EngineError, match=r"did not start: .*No module named 'fedraclora'"):
        pool.facts()
    pool.close()


def test_more_than_there_is_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"engine\.workers=3.*2 CPUs and 0 GPUs.* 2"):
        Cluster(RayConfig(workers=3), "cpu")
    with pytest.raises(ConfigError, match=r"engine\.gpus=1: .*0 GPUs, enough for 0"):
        Cluster(RayConfig(), "cuda")
    assert ray.is_initialized()  # what others started is left alone


@pytest.mark.parametrize("address", ["host", "host:port", ":1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"engine.address=.*auto .*, host:port"):
        check_address(address)


def test_an_address_where_nobody_listens_is_named() -> None:
    with pytest.raises(EngineError, match=r"engine\.address=127\.0\.0\.1:1: no Ray cluster"):
        check_address("127.0.0.1:1")


@pytest.mark.parametrize("word", [b"", b"HTTP/1.1 400 Bad Request"])
def test_what_listens_and_is_no_cluster_is_named(
    word: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer() -> None:
        link, _ = listener.accept()
        with link, suppress(ConnectionError):
            link.sendall(word)
            while link.recv(100):  # and never another word
                pass

    monkeypatch.setattr("fedraclora.engines.ray.cluster.PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(EngineError, match=f"{address}: no Ray cluster"):
            check_address(address)
        thread.join()
