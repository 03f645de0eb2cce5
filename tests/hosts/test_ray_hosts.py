"""A Ray cluster of hosts, one of which alone has the code, the user's modules and the data."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import fedraclora
from fedraclora.experiments.hosts import Bed, Host, Process
from tests.common import summary_of

pytestmark = pytest.mark.long

SOURCES = ("fedraclora", "strategies", "clients", "experiments", "conf", "tests")
CORES = (1, 3, 1, 2)
PORT = 6379
VERBOSE = "output.verbose=true"  # shows hosts and workers
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "7d" * 32, "PYTHONPATH": ""}
TOKEN |= {"RAY_prestart_worker_first_driver": "0"}
PROJECT = "/tmp/home/project"
MODEL = """
import torch

WIDTH = 6

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.outer = torch.nn.Linear(5, WIDTH), torch.nn.Linear(WIDTH, 2)

    def forward(self, x):
        from aside import squash  # only where it is called
        return self.outer(squash(self.inner(x)))

def network(shape, classes):
    return Net()
"""
WORDS = (
    "data=own",
    f"data.samples={PROJECT}/samples",
    "data.classes=2",
    "data.shape=[5]",
    "model=function",
    "model.function=mine:network",
    "clients=8",
    "clients_per_round=6",
    "rounds=3",
    "method.rank=2",
    "pretrain=none",
    "engine.chunk=1",
    "output=study",
)


def hide(host: Host) -> None:
    """Take the code of this project from a host, wherever Python finds it here."""
    found = "import fedraclora as f, pathlib as p; print(p.Path(f.__file__).parents[1])"
    installed = subprocess.check_output([sys.executable, "-Ic", found], text=True).strip()
    for root in {Path(installed), Path(fedraclora.__file__).parents[1]}:
        for name in SOURCES:
            if (root / name).is_dir():
                host.own(root / name)
    with pytest.raises(subprocess.CalledProcessError):
        host.run([sys.executable, "-c", "import fedraclora.api"], env={"PYTHONPATH": ""})


LOOK = """
import sys, time
from ray._raylet import GcsClient

head = GcsClient(address=sys.argv[1])
while sum(not node.state for node in head.get_all_node_info().values()) < int(sys.argv[2]):
    time.sleep(0.2)
"""


def start(host: Host, head: Host, cores: int, hosts: int) -> Process:
    """Start Ray on a host, until so many are there: on a busy machine Ray gives up at times."""
    at = f"{head.address}:{PORT}"
    where = ["--head", f"--port={PORT}"] if host is head else [f"--address={at}"]
    words = ["--block", "--disable-usage-stats", f"--num-cpus={cores}", *where]
    words += ["--object-store-memory=100000000", *["--include-dashboard=false"] * (host is head)]
    ray = Path(sys.executable).parent / "ray"
    for _ in range(5):
        with host.path("/tmp/ray.out").open("w") as out:
            process = host.popen([ray, "start", *words], env=TOKEN, stdout=out, stderr=out)
        with host.popen([sys.executable, "-c", LOOK, at, str(hosts)], env=TOKEN) as look:
            while look.poll() is None and process.poll() is None:
                time.sleep(0.2)
            look.kill()
        if process.poll() is None and look.returncode == 0:
            return process
        process.kill()
    pytest.fail(host.path("/tmp/ray.out").read_text())


def simulate(
    host: Host, name: str, *words: str, of: Sequence[str] = WORDS
) -> tuple[dict[str, object], str]:
    """Run a simulation on a host, from the user's folder; give its summary and what it said."""
    env = {**TOKEN, "PYTHONPATH": str(Path(fedraclora.__file__).parents[1])}
    words = (*of, *words, f"output.dir=/tmp/home/{name}", "output.progress=true", VERBOSE)
    command = [sys.executable, "-m", "fedraclora.commands.cli", "simulate", *words]
    pipe = subprocess.PIPE
    with host.popen(command, env=env, cwd=PROJECT, stdout=pipe, stderr=pipe) as process:
        _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return summary_of(host.path(name)), said


@pytest.fixture
def bed(beds: type[Bed]) -> Iterator[Bed]:
    with beds(4) as bed:
        head, second, *others = bed
        for host in (second, *others):
            hide(host)
        folder = head.path(PROJECT)
        (folder / "samples").mkdir(parents=True)
        (folder / "mine.py").write_text(MODEL)
        (folder / "aside.py").write_text("from torch import tanh as squash\n")
        draw = np.random.default_rng(5)
        for client in range(8):
            x = draw.normal(size=(9 + client, 5)).astype(np.float32)
            target = (x[:, 0] > 0.1).astype(np.int64)
            np.savez(folder / f"samples/{client}.npz", x=x, target=target)
        # What lies at the same place elsewhere is another state of it.
        second.path(PROJECT).mkdir()
        (second.path(PROJECT) / "mine.py").write_text(MODEL.replace("WIDTH = 6", "WIDTH = 4"))
        yield bed


def test_one_two_and_four_hosts_give_the_bits_of_one_process(bed: Bed) -> None:
    head, second, third, fourth = bed
    wanted, _ = simulate(head, "plain")
    with ExitStack() as ending:
        for new, name in ([head], "one"), ([second], "two"), ([third, fourth], "four"):
            for host in new:
                k = bed.hosts.index(host)
                process = start(host, head, CORES[k], k + 1)
                ending.callback(process.wait, 60)
                ending.callback(process.terminate)
            there = bed.hosts[: bed.hosts.index(new[-1]) + 1]
            came = second.received()
            words = ("engine=ray", f"engine.address={head.address}:{PORT}")
            found, said = simulate(head, name, *words)
            for digest in ("weights_digest", "ledger_digest"):
                assert found[digest] == wanted[digest], name
            workers = sum(CORES[: len(there)])
            assert f"{head.address}:{PORT} (engine.address)" in said
            assert f"{workers}: " in said
            assert all(host.address in said for host in there)
            if name == "two":  # the code once, for three workers
                assert 1e6 < second.received() - came < 2.5e6
                assert f"{second.address}" in said.partition("samples:")[2].splitlines()[0]
            if name == "four":  # it is there already
                assert second.received() - came < 1e6
