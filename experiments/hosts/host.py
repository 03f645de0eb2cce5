"""One host of a bed: its processes, files, address and link."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from fedraclora.experiments.hosts.namespaces import SECONDS, Namespaces, Process

HOME = "/tmp/home"
# An address that does not answer is asked for on and on: who is cut off is silent, as behind a
# router, and not unreachable.
SILENT = (
    "for how in mcast ucast; do echo 100000 > /proc/sys/net/ipv4/neigh/eth0/${how}_solicit; done"
)
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
# /tmp and /dev/shm are its own; the names of all hosts are known.
FIRST = """
mount --bind "$2" /etc/hosts; mount --bind "$1" /tmp; hostname "$3"
mount -t tmpfs tmpfs /dev/shm
"""


class Host:
    """A host: `Bed` makes it.

    Args:
        name: Of the host; others find its address by it.
        folder: Outside; on the host it is /tmp, and home is in it.
        names: The file that is its /etc/hosts.
        switch: Where the other end of its link is, a device of the host's name.
        uid: Who runs processes there; None: root.

    Attributes:
        address: Its IPv4 address.
    """

    def __init__(
        self, name: str, folder: Path, names: Path, switch: Namespaces, uid: int | None
    ) -> None:
        self.name, self.folder, self.names, self.switch = name, folder, names, switch
        self.uid, self.address = uid, ""
        (folder / "home").mkdir(parents=True)
        for made in (folder, folder / "home"):
            os.chown(made, uid or 0, uid or 0)
        self.inside = Namespaces(FIRST, [str(folder), str(names), name])

    def join(self, address: str) -> None:
        """Lay its link, and take an address."""
        ends = f"{self.name} netns {self.switch.pid} type veth peer eth0 netns {self.inside.pid}"
        subprocess.run(["ip", "link", "add", *ends.split()], check=True)
        self.switch.run(f"ip link set dev {self.name} master bridge up".split())
        self.inside.run(["sh", "-ec", f"ip link set dev eth0 up; {SILENT}"])
        self.move(address)

    def popen(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = HOME,
        root: bool = False,
        **streams: int | IO[str] | None,
    ) -> Process:
        """Start a process there.

        Args:
            command: Program and arguments.
            env: What is added to this process's environment.
            cwd: A folder as the host has it.
            root: Whether it is root's, and not that of the host's user.
            streams: As `subprocess.Popen` has them; text.
        """
        whole = {**os.environ, "HOME": HOME, "TMPDIR": "/tmp", **(env or {})}
        uid = None if root else self.uid
        return self.inside.popen(command, env=whole, cwd=cwd, uid=uid, **streams)

    def run(
        self,
        command: Sequence[str | Path],
        *,
        timeout: float = SECONDS,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = HOME,
        root: bool = False,
    ) -> str:
        """Run a command there; give what it printed.

        Raises:
            CalledProcessError: If its status is not 0; ``stderr`` is what it said.
            TimeoutExpired: After so many seconds, when it has been killed.
        """
        whole = {**os.environ, "HOME": HOME, "TMPDIR": "/tmp", **(env or {})}
        uid = None if root else self.uid
        return self.inside.run(command, timeout, env=whole, cwd=cwd, uid=uid)

    def path(self, inside: str | Path) -> Path:
        """Say where outside a file of the host is: ``/tmp/x``, or ``x`` of its home."""
        return self.folder / (Path(HOME) / inside).relative_to("/tmp")

    def own(self, folder: str | Path, size: str | None = None) -> None:
        """Give the host a folder of its own, empty, in memory; what is there elsewhere it lacks.

        Args:
            folder: As the host has it; made if need be, where that is in /tmp.
            size: How much goes in, as ``1m``; None: what memory holds.
        """
        self.run(["mkdir", "-p", folder], root=True)
        options = f"mode=755,uid={self.uid or 0}" + (f",size={size}" if size else "")
        self.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], root=True)

    def copy(self, folder: str | Path) -> None:
        """Give the host a copy of a folder to which it alone writes (an overlay)."""
        layers = f"/tmp/.layers{str(folder).replace('/', '-')}"
        self.own(layers)
        made = [f"{layers}/up", f"{layers}/work"]
        self.run(["mkdir", *made], root=True)
        options = f"lowerdir={folder},upperdir={made[0]},workdir={made[1]}"
        self.run(["mount", "-t", "overlay", "-o", options, "overlay", folder], root=True)

    def link(self, up: str | None = None, down: str | None = None) -> None:
        """Limit the link: ``10mbit``; None: no limit."""
        _limit(self.inside, "eth0", up)
        _limit(self.switch, self.name, down)

    def cut(self) -> None:
        """Cut the link at its other end: packets are dropped without an error."""
        self.switch.run(["ip", "link", "set", "dev", self.name, "nomaster"])

    def heal(self) -> None:
        """Join the link again."""
        self.switch.run(["ip", "link", "set", "dev", self.name, "master", "bridge"])

    def move(self, address: str) -> None:
        """Take another address of the bed's subnet; what was open under the old one hangs."""
        gateway = address.rpartition(".")[0] + ".1"
        lines = f"ip addr flush dev eth0; ip addr add {address}/24 dev eth0"
        self.inside.run(["sh", "-ec", f"{lines}; ip route replace default via {gateway}"])
        rows = [x for x in self.names.read_text().splitlines() if x.split()[-1] != self.name]
        self.names.write_text("\n".join([*rows, f"{address} {self.name}", ""]))
        self.address = address

    def sent(self) -> int:
        """Count the bytes that have left the host, with all headers."""
        return self._counters()[8]

    def received(self) -> int:
        """Count the bytes that have come to the host, with all headers."""
        return self._counters()[0]

    def _counters(self) -> list[int]:
        text = Path(f"/proc/{self.inside.pid}/net/dev").read_text()
        return [int(x) for x in text.partition("eth0:")[2].splitlines()[0].split()]

    def kill(self) -> None:
        """Kill all processes; the kernel closes their connections, and the others are told.

        With `cut` before, it is a host without power.
        """
        self.inside.signal_all(signal.SIGKILL)

    def stop(self) -> None:
        """Stop all processes: connections stay open without an answer."""
        self.inside.signal_all(signal.SIGSTOP)

    def cont(self) -> None:
        """Let them go on."""
        self.inside.signal_all(signal.SIGCONT)


def _limit(where: Namespaces, device: str, rate: str | None) -> None:
    """Let a device send no faster than at a rate, in bursts of 10 ms or 16 kB.

    What waits there is lost. If it stayed, a segment of up to 64 kB (the kernel cuts them to the
    burst as they come) could be longer than the new burst: nothing would ever pass again.
    """
    where.run(["sh", "-c", f"tc qdisc del dev {device} root 2> /dev/null || true"])
    if rate is None:
        return
    found = re.fullmatch(r"([\d.]+)([kmg]bit)", rate)
    if found is None:
        raise ValueError(f"rate={rate!r}: expected 10mbit, 500kbit or 1gbit")
    burst = max(16_000, int(float(found[1]) * UNITS[found[2]] / 8 / 100))
    limits = f"tbf rate {rate} burst {burst} latency 300ms"
    where.run(["tc", "qdisc", "add", "dev", device, "root", *limits.split()])
