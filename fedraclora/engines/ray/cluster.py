"""A Ray cluster for one run: started here and ended here, or joined and left."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import ray
from ray.exceptions import RayError

from fedraclora.config.settings import RayConfig
from fedraclora.engines.private_ray import ENVIRONMENT, LastWord, cpus
from fedraclora.engines.ray.session import RaySession, own_sigterm, refuse_open_ray
from fedraclora.errors import ConfigError, EngineError

# What `fedraclora` lies in: workers import the code that the driver runs.
CODE = str(Path(__file__).resolve().parents[3])
# What opens a connection of HTTP/2, and the type of the frame by which a server answers it. Ray
# waits for ever where something listens that does not.
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS = b"\x04"
PATIENCE = 10.0  # seconds in which an address must answer


class Cluster:
    """The machines whose processes train.

    Args:
        settings: Workers, address, share of a GPU.
        device: cpu or cuda.

    Attributes:
        workers: Processes to start.
        gpus: Share of a GPU of each.

    Raises:
        ConfigError: If more is asked for than there is.
        EngineError: If the cluster does not start, or cannot be reached.
    """

    def __init__(self, settings: RayConfig, device: str) -> None:
        self.gpus = float(device == "cuda") if settings.gpus is None else settings.gpus
        self.joined = ray.is_initialized()
        self._session: RaySession | None = None  # of a Ray that is started here
        self._last_word = LastWord()
        try:
            if not self.joined:
                with own_sigterm():
                    self._start(settings)
            self.workers = self._count(settings)
        except BaseException:
            self.close()
            raise

    def _start(self, settings: RayConfig) -> None:
        alone = settings.address is None
        if settings.address is None:
            self._session = RaySession()
        else:
            os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
            check_address(settings.address)
        try:
            ray.init(
                # Not from RAY_ADDRESS: which cluster is used stands in the config alone.
                address="local" if settings.address is None else settings.address,
                num_cpus=(settings.workers or cpus()) if alone else None,
                include_dashboard=False if alone else None,
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=False,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
            where = "on this machine" if alone else f"at {settings.address}"
            raise EngineError(
                f"Ray cannot be reached or started {where}: {error}; check engine.address, that "
                "the cluster's token is here (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN), if it asks "
                "for one, and that it runs this version of Ray and Python "
                f"({ray.__version__}, {sys.version.split()[0]})"
            ) from error
        if alone:
            refuse_open_ray()

    def _count(self, settings: RayConfig) -> int:
        there: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cpus, cards = int(there.get("CPU", 0)), there.get("GPU", 0.0)
        fit = min(cpus, int(cards / self.gpus)) if self.gpus else cpus
        workers = fit if settings.workers is None else settings.workers
        if not 1 <= workers <= fit:
            raise ConfigError(
                f"engine.workers is {settings.workers} with {self.gpus:g} GPU each, but the Ray "
                f"cluster has {cpus} CPUs and {cards:g} GPUs, enough for {fit}; lower "
                "engine.workers or engine.gpus"
            )
        return workers

    def close(self) -> None:
        """End what was started, leave what was joined."""
        self._last_word.close()
        if self._session is not None:
            self._session.close()
            self._session = None
        elif not self.joined:
            with own_sigterm():
                ray.shutdown()


def check_address(address: str) -> None:
    """Reject an address where no cluster is: Ray would end this process, or wait without end.

    Raises:
        ConfigError: If it is no address of a cluster's head.
        EngineError: If nobody answers there.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise ConfigError(
            f"engine.address is {address!r}; auto (a cluster of this machine), or host:port of a "
            "cluster's head, is wanted"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PATIENCE) as link:
            if os.environ.get("RAY_USE_TLS", "0").lower() in {"0", "false"}:
                link.sendall(HTTP2)
                if link.recv(9)[3:4] != SETTINGS:  # nothing, or another protocol
                    raise ConnectionError("what listens there is none")
    except OSError as error:
        raise EngineError(
            f"there is no Ray cluster at {address} ({error}); start one (ray start --head), or "
            "leave engine.address null"
        ) from error


def worker_environment(threads: int) -> dict[str, str]:
    """Build the environment of a worker: threads, and where this process finds modules.

    `CODE` comes last: folders of a checkout have names that folders of a user's have, too.
    """
    own = (sys.prefix, sys.base_prefix)
    path = [part or str(Path.cwd()) for part in sys.path if not part.startswith(own)]
    path += [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), CODE]
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        **{k: os.environ[k] for k in ("HF_HUB_OFFLINE", *ENVIRONMENT) if k in os.environ},
    }
