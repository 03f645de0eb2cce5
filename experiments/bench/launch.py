"""Runs the peers: each in its own virtual environment, as a subprocess, on the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedraclora.commands import CODE
from fedraclora.data.task import Task
from fedraclora.errors import ConfigError
from fedraclora.experiments.bench.workloads import LR, Workload

FILES = ("data.npz", "start.npz", "final.npz", "outcome.json")  # of a peer's work
PATIENCE = 1800.0  # seconds for one peer


def interpreter(folder: Path, peer: str) -> Path | None:
    """Find the Python of a peer; None if ``make bench-peers`` has not finished it."""
    home = folder.absolute() / peer
    # Not resolved: the link leads out of the environment.
    return home / "bin" / "python" if (home / ".installed").exists() else None


def write_work(folder: Path, workload: Workload, task: Task, rounds: int, threads: int) -> Path:
    """Write data, initial weights and settings where a peer reads them.

    Args:
        folder: Where to.
        workload: The local work.
        task: A task whose samples are vectors.
        rounds: All rounds, the first included.
        threads: Of torch, in each process.

    Returns:
        The file of settings, which names the others.
    """
    data = task.train
    samples, _ = data.table or (None, None)
    if samples is None or set(samples.inputs) != {"x"}:
        raise ConfigError(
            "the peers train on vectors only, and the data of this workload are others: leave the "
            "peers out of it"
        )
    shape = (data.num_clients, workload.samples)
    x, y = samples.inputs["x"].cpu().numpy(), samples.target.cpu().numpy()
    np.savez(folder / "data.npz", x=x.reshape(*shape, -1), y=y.reshape(shape))
    start: dict[str, Any] = {n: p.detach().cpu().numpy() for n, p in task.model.named_parameters()}
    np.savez(folder / "start.npz", **start)
    settings = {
        "paths": {Path(name).stem: str(folder / name) for name in FILES},
        "rounds": rounds,
        "batch": workload.batch,
        "lr": LR,
        "threads": threads,
    }
    path = folder / "work.json"
    path.write_text(json.dumps(settings))
    return path


def run_peer(
    peer: str, python: Path, workload: Workload, task: Task, rounds: int, threads: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run a peer to its end.

    Args:
        peer: Its name, that of the module ``fedraclora.experiments.bench.peers.<name>_peer``.
        python: Of its environment.
        workload: The local work.
        task: The task.
        rounds: All rounds, the first included.
        threads: Of torch, in each process.

    Returns:
        What it did: ``wall`` and ``cpu``, seconds of each round over its processes; ``peak``,
        bytes, the peak resident size summed over them; ``versions`` of its packages. And its
        weights after the last round.

    Raises:
        ConfigError: If it fails or takes too long, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = write_work(folder, workload, task, rounds, threads)
        log = folder / "said.txt"
        with log.open("w") as file:
            process = subprocess.Popen(  # noqa: S603
                [str(python), "-m", f"fedraclora.experiments.bench.peers.{peer}_peer"],
                env=environment(work, threads),
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end(process)
        if status != 0 or not (folder / "outcome.json").exists():
            why = "took too long" if status is None else f"ended with status {status}"
            last = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise ConfigError(f"peer {peer} {why}:\n{last}")
        found = json.loads((folder / "outcome.json").read_text())
        with np.load(folder / "final.npz") as stored:
            weights = {n: torch.from_numpy(np.array(stored[n])) for n in stored.files}
    return found, weights


def environment(work: Path, threads: int) -> Mapping[str, str]:
    """Make the environment variables of a peer: this checkout on the path, nothing sent home."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {
        **inherited,
        "PYTHONPATH": str(CODE.parent),
        "PYTHONWARNINGS": "ignore",
        "BENCH_WORK": str(work),
        "FLWR_HOME": str(work.parent / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a peer: it leads a process group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
