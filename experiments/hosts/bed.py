"""A bed of hosts: N hosts on one bridge, for as long as a ``with`` lasts."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self

from fedraclora.experiments.hosts.host import Host
from fedraclora.experiments.hosts.namespaces import Namespaces

SUBNET = "10.71.{}"  # /24
BRIDGE = "ip link add bridge type bridge; ip link set bridge up"
TRY = f"""{BRIDGE}; ip link add one type veth peer name two; ip link set dev one master bridge
tc qdisc add dev two root tbf rate 1mbit burst 16kb latency 100ms"""


@lru_cache(maxsize=1)
def why_not() -> str:
    """Say why no bed is to be had here; empty: it is."""
    if os.geteuid():
        return "hosts are network namespaces, which root alone may make"
    missing = [name for name in ("ip", "tc", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"hosts need {', '.join(missing)} (iproute2, util-linux)"
    try:
        Namespaces(TRY).close()
    except OSError as error:
        return str(error)
    return ""


class Bed:
    """Hosts with an address each, joined by a bridge; this process has an address there, too.

    Nothing is left behind, however this process ends: devices, mounts and processes are those of
    namespaces, which end with it. The folder of a bed whose process was killed goes with the next.

    Args:
        hosts: How many; they are called host0, host1, ...
        rate: Of all links, up and down, as ``10mbit``; None: no limit.
        uid: Who runs processes there; None: root.

    Attributes:
        hosts: The hosts.
        gateway: The address of this process.

    Use::

        with Bed(2, rate="10mbit") as (one, two):
            print(one.run(["curl", f"http://{two.address}:8000"]))
    """

    def __init__(self, hosts: int = 3, rate: str | None = None, *, uid: int | None = None) -> None:
        self.number, self.rate, self.uid = hosts, rate, uid
        self.hosts: list[Host] = []
        self.ending = ExitStack()

    def __enter__(self) -> Self:
        """Make the hosts."""
        _remove_the_dead()
        with ExitStack() as stack:
            made = tempfile.TemporaryDirectory(prefix=f"bed-{os.getpid()}-")
            folder = Path(stack.enter_context(made)).resolve()
            folder.chmod(0o755)
            (names := folder / "hosts").write_text("127.0.0.1 localhost\n")
            switch = Namespaces(BRIDGE)
            stack.callback(switch.close)
            self.gateway = _yard(switch)
            for k in range(self.number):
                host = Host(f"host{k}", folder / f"host{k}", names, switch, self.uid)
                stack.callback(host.inside.close)
                host.join(self.gateway.rpartition(".")[0] + f".{k + 2}")
                if self.rate is not None:
                    host.link(self.rate, self.rate)
                self.hosts.append(host)
            self.ending = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all processes of the hosts, and remove what is theirs."""
        self.ending.close()

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def __getitem__(self, k: int) -> Host:
        return self.hosts[k]


def _remove_the_dead() -> None:
    """Remove the folders of beds whose process was killed; all else of them has gone with it."""
    for folder in Path(tempfile.gettempdir()).glob("bed-*-*"):
        if not Path("/proc", folder.name.split("-")[1]).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _yard(switch: Namespaces) -> str:
    """Join this process to the bridge; give its address, of a subnet that no other bed has.

    The name of the device says which it is, and is there once.
    """
    first = os.getpid()
    for k in (1 + (first + i) % 254 for i in range(254)):
        line = f"ip link add bed-{k} type veth peer name yard netns {switch.pid}"
        if subprocess.run(line.split(), capture_output=True, check=False).returncode == 0:
            switch.run(["ip", "link", "set", "dev", "yard", "master", "bridge", "up"])
            address = SUBNET.format(k) + ".1"
            for more in (f"ip addr add {address}/24 dev bed-{k}", f"ip link set dev bed-{k} up"):
                subprocess.run(more.split(), check=True)
            return address
    raise OSError("no subnet is left for another bed of hosts")
