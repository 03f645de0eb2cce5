"""Start a Ray cluster for one run, or join and leave one."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import services, worker
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import RayError
from ray.job_config import JobConfig
from ray.util import client as ray_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from typing_extensions import override

from fedraclora.config.settings import RayConfig
from fedraclora.data.locate import file_digest
from fedraclora.engines.private_ray import ENVIRONMENT, ExitReporter, cpus
from fedraclora.engines.ray.packages import CodePackages
from fedraclora.engines.ray.pulse import PATIENCE, check_response
from fedraclora.engines.ray.session import LOOPBACK, RaySession, own_sigterm, refuse_open_ray
from fedraclora.errors import ConfigError, EngineError

# Folders that contain `fedraclora`: workers import the code that the driver runs.
CODE = str(Path(__file__).resolve().parents[3])
SETTLING = 10.0  # seconds until a cluster notices that a run has ended, on busy machines, too
ROUNDING = 1e-6  # resolution of shares of a GPU
SOME = 8  # most hosts in a message
CLIENT = "ray://"


class ImportPathGuard(list[str]):
    """Keep Ray from putting the script's and the working folder first on all hosts' paths."""

    @override
    def extend(self, _: Iterable[str]) -> None:
        """Ignore the paths and clear the list: Ray takes an empty list for none at all."""
        self.clear()


@dataclass(frozen=True)
class RayHost:
    """Describe a machine of a cluster.

    Attributes:
        node: Its number in the cluster.
        address: Its address.
        cores, cards: CPUs and GPUs that it provides to Ray.
        room: Workers for which it has a free core and share of a GPU.
    """

    node: str
    address: str
    cores: float
    cards: float
    room: int


class Cluster:
    """Manage the machines whose processes train.

    Args:
        settings: Workers, address, share of a GPU.
        device: cpu or cuda.

    Attributes:
        workers: Processes to start.
        gpus: Share of a GPU of each.
        told: Facts for the start of a run, by title; empty for a Ray of this machine.

    Raises:
        ConfigError: If more resources are requested than exist.
        EngineError: If the cluster does not start, or cannot be reached.
    """

    def __init__(self, settings: RayConfig, device: str) -> None:
        self.settings, self.device = settings, device
        self.gpus = float(device == "cuda") if settings.gpus is None else settings.gpus
        self.joined = ray.is_initialized()
        self.facts: dict[str, str] = {}
        self._session: RaySession | None = None  # processes of a Ray that is started here
        self._last_word = ExitReporter()
        address, said_by = address_of(settings)
        if ray_client.ray.is_connected():  # type: ignore[no-untyped-call]
            address, said_by = f"{CLIENT}...", "the address that ray.init was given"
            check_address(address, said_by)
        try:
            if not self.joined:
                with own_sigterm():
                    self._start(address, said_by)
            at = ray.get_runtime_context().gcs_address
            shared = at.rpartition(":")[0].strip("[]") not in LOOPBACK
            self._code = CodePackages() if shared else None
            self.hosts = self._hosts()
            self.workers = self._count()
            if self._code is not None:
                by = "joined by this program" if self.joined else said_by
                self.facts |= {"cluster": f"{at} ({by}), {self._size()}", "code": self._code.facts}
        except BaseException:
            self.close()
            raise

    def _start(self, address: str | None, said_by: str) -> None:
        alone = address is None
        if address is None:
            self._session = RaySession()
        else:
            os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
            check_address(address, said_by)
        try:
            if address is not None:  # without its token Ray would retry for a minute
                host, _, port = address.rpartition(":")
                with suppress(OSError):  # Ray's processes use a name server, not /etc/hosts
                    address = f"{socket.gethostbyname(host)}:{port}" if host else address
                GcsClient(services.canonicalize_bootstrap_address(address))
            # A run reports incidents of its own hosts, and none of others or of earlier ones.
            worker._worker_logs_enabled = alone  # noqa: SLF001
            ray.init(
                address=address or "local",
                num_cpus=(self.settings.workers or cpus()) if alone else None,
                include_dashboard=False if alone else None,
                job_config=JobConfig(_py_driver_sys_path=None if alone else ImportPathGuard([""])),
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=False,
            )
        # Ray raises this without details if a part of it starts too slowly
        except Exception as error:
            where = "on this machine" if alone else f"at {address}"
            raise EngineError(
                f"Ray cannot be reached or started {where}: {error}. Check {said_by}, the "
                "token (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN), and that the cluster runs "
                f"Ray {ray.__version__} and Python {sys.version.split()[0]}"
            ) from error
        if alone:
            refuse_open_ray()

    def _hosts(self) -> list[RayHost]:
        """List the machines that are connected now."""
        found = []
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            if node["Alive"]:
                there: Mapping[str, float] = node["Resources"]
                cores, cards = there.get("CPU", 0), there.get("GPU", 0)
                room = int(min(cores, cards / self.gpus + ROUNDING) if self.gpus else cores)
                address = str(node["NodeManagerAddress"])
                found.append(RayHost(str(node["NodeID"]), address, cores, cards, room))
        return found

    def _count(self) -> int:
        """Choose the number of workers: as many as fit, unless fewer are requested."""
        fit, asked = sum(host.room for host in self.hosts), self.settings.workers
        without = [host.address for host in self.hosts if not host.cards]
        if self.device == "cuda" and not self.gpus and len(self.hosts) > 1 and without:
            raise ConfigError(
                "engine.gpus=0: Ray puts workers on any host, but the device is cuda and "
                f"{', '.join(without[:SOME])} has no GPU. Set engine.gpus to the share of a "
                "GPU for each worker"
            )
        workers = self._free(fit) if asked is None else asked
        if not 1 <= workers <= fit:
            raise ConfigError(
                f"engine.workers={asked}, engine.gpus={self.gpus:g}: the Ray cluster has "
                f"{self._size()}, enough for {fit}. Lower engine.workers or engine.gpus"
            )
        return workers

    def _free(self, fit: int) -> int:
        """Count the workers that fit besides other users' processes; all if none would."""
        end = time.monotonic() + SETTLING
        while True:  # a run that has just ended releases its cores in a moment
            left: Mapping[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
            cards = left.get("GPU", 0) / self.gpus + ROUNDING if self.gpus else fit
            free = int(min(fit, left.get("CPU", 0), cards))
            if free == fit or time.monotonic() > end:
                return free or fit
            time.sleep(0.1)

    def room(self) -> int:
        """Count the workers that fit on the machines that are connected now."""
        self.there = self._hosts()
        return sum(host.room for host in self.there)

    def new_machines(self) -> list[RayHost]:
        """List machines that are new since the last count; each is reported once."""
        known = {host.node for host in self.hosts}
        new = [host for host in self.there if host.node not in known]
        self.hosts += new
        return new

    def _size(self) -> str:
        cores, cards = (sum(getattr(h, n) for h in self.hosts) for n in ("cores", "cards"))
        several = f"{len(self.hosts)} hosts with " if len(self.hosts) > 1 else ""
        return f"{several}{cores:g} CPUs and {cards:g} GPUs"

    def runtime_env(self) -> dict[str, Any]:
        """Describe a worker's environment: threads, and the location of the code."""
        threads = str(self.settings.threads)
        names = ("HF_HUB_OFFLINE", *ENVIRONMENT)
        variables = {name: os.environ[name] for name in names if name in os.environ}
        variables |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self._code is None:
            return {"env_vars": {**variables, "PYTHONPATH": own_path()}}
        return {"env_vars": variables, "py_modules": self._code.uris()}

    def lacking(self, folder: Path) -> list[str]:
        """Return the hosts on which a folder differs from the one here.

        Raises:
            EngineError: If one cannot be asked.
        """
        if self._code is None:
            return []
        here = str(folder.absolute())
        look, env = ray.remote(folder_digest), self.runtime_env()

        def ask(node: str) -> Any:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            return look.options(num_cpus=0, runtime_env=env, scheduling_strategy=there).remote(here)

        asked = {host.address: ask(host.node) for host in self.hosts}
        wanted = folder_digest(here)
        try:
            return [address for address, found in asked.items() if ray.get(found) != wanted]
        except RayError as error:
            raise EngineError(f"a host of the Ray cluster cannot read {here}: {error}") from error

    def close(self) -> None:
        """End a Ray that was started here; disconnect from one that was joined."""
        self._last_word.close()
        if self._session is not None:
            self._session.close()
            self._session = None
        elif not self.joined:
            with own_sigterm():
                ray.shutdown()
            worker._worker_logs_enabled = True  # noqa: SLF001


def address_of(settings: RayConfig) -> tuple[str | None, str]:
    """Return the address of the cluster to join, and its source; None: start a private Ray.

    As in Ray itself, RAY_ADDRESS is used if the config has no address; inside a job it is set.
    """
    named = os.environ.get("RAY_ADDRESS") or None
    address, said_by = settings.address, "engine.address"
    if address is None and named is not None:
        address, said_by = named, "RAY_ADDRESS"
    return (None if address == "local" else address), said_by


def check_address(address: str, said_by: str = "engine.address") -> None:
    """Reject an address without a cluster, since Ray would exit or wait forever.

    Args:
        address: The address.
        said_by: Its source, for messages.

    Raises:
        ConfigError: If it is no address of a cluster's head.
        EngineError: If it does not respond.
    """
    if address == "auto":
        return
    if "://" in address:
        raise ConfigError(
            f"{said_by}={address!r}: a Ray client address cannot be used from outside the "
            "cluster. Submit the command as a job (ray job submit --address=http://HOST:8265 "
            "--working-dir=. -- fedraclora simulate engine=ray ...), or run it on a host of "
            "the cluster with engine.address=auto"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise ConfigError(
            f"{said_by}={address!r}: not an address of a Ray cluster. Use auto (a cluster on "
            "this machine), host:port of a cluster's head, or local (start a private Ray)"
        )
    try:
        check_response(host.strip("[]"), int(port), PATIENCE)
    except OSError as error:
        raise EngineError(
            f"{said_by}={address}: no Ray cluster answers there ({error}). Start one (ray "
            "start --head), or set engine.address=local"
        ) from error


def own_path() -> str:
    """Return the module path of this process, for other processes of this machine.

    `CODE` comes last, since folders of a checkout may have the same names as a user's.
    """
    own = (sys.prefix, sys.base_prefix)
    path = [part or str(Path.cwd()) for part in sys.path if not part.startswith(own)]
    path += [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), CODE]
    return os.pathsep.join(dict.fromkeys(path))


def folder_digest(folder: str) -> dict[str, str]:
    """Hash the files of a folder, by name; empty if it does not exist."""
    return {path.name: file_digest(path) for path in Path(folder).glob("*") if path.is_file()}
