"""Which addresses the processes below this one listen at, from /proc (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedraclora.experiments.bench.usage import descendants

LISTENS = "0A"  # the state of a socket in /proc/net/tcp
# 127.0.0.1 and ::1, also where IPv4 is written as IPv6; the words are in the machine's byte order.
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")

needs_proc = pytest.mark.skipif(
    not Path("/proc/net/tcp").exists(), reason="there is no /proc/net/tcp: not Linux"
)


def listeners(top: int | None = None) -> dict[str, str]:
    """Give address -> command for each socket that listens, of a process and all below it.

    Args:
        top: The process; this one by default.
    """
    owners = {}
    for pid in [top or os.getpid(), *descendants(top)]:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            for link in Path(f"/proc/{pid}/fd").iterdir():
                owners[str(link.readlink())] = command
        except OSError:  # it has just ended
            continue
    found = {}
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            words = line.split()
            if words[3] == LISTENS and (owner := owners.get(f"socket:[{words[9]}]")):
                found[words[1]] = owner
    return found


def off_loopback(found: dict[str, str]) -> dict[str, str]:
    """Keep those that other machines may reach."""
    return {a: who for a, who in found.items() if a.partition(":")[0] not in LOOPBACK}
