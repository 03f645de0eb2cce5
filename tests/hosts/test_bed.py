"""The bed of hosts itself: what joins hosts, what parts them, and that nothing is left of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedraclora.experiments.hosts import Bed, Host, Process

pytestmark = pytest.mark.long

# Not that of an environment, which a host does not see where it is in /tmp.
PYTHON = [Path(sys.executable).resolve(), "-ISc"]
# Says where it is, and gives back what comes.
ECHO = """if True:
    import os, socket
    server = socket.create_server(("", 7000))
    print("up", flush=True)
    while True:
        line = server.accept()[0]
        while data := line.recv(1 << 16):
            line.sendall(data)
"""
# Writes so many bytes to an address; then says how long it took until they were back.
WRITE = """if True:
    import socket, sys, time
    began, count = time.monotonic(), int(sys.argv[2])
    line = socket.create_connection((sys.argv[1], 7000))
    line.sendall(bytes(count))
    while count:
        count -= len(line.recv(1 << 16))
    print(time.monotonic() - began, flush=True)
"""
# For two seconds sends megabytes to an address, each when the one before is back.
SEND = """if True:
    import socket, sys, time
    line, end = socket.create_connection((sys.argv[1], 7000)), time.monotonic() + 2
    while time.monotonic() < end:
        line.sendall(bytes(1 << 20))
        left = 1 << 20
        while left:
            left -= len(line.recv(1 << 16))
"""


def echo(host: Host) -> Process:
    """Start what gives back everything."""
    process = host.popen([*PYTHON, ECHO], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def write(host: Host, to: str, count: int = 1) -> float:
    """Send bytes there and back; give the seconds."""
    return float(host.run([*PYTHON, WRITE, to, str(count)]))


def soon(true: Callable[[], bool]) -> bool:
    """Wait for what the kernel does when it has time."""
    return any(true() or time.sleep(0.02) for _ in range(1500))  # type: ignore[func-returns-value]


@pytest.fixture(scope="module")
def three(beds: type[Bed]) -> Iterator[Bed]:
    """A bed that several tests use, and leave as it was."""
    with beds(3) as bed:
        for host in bed:
            echo(host)
        yield bed


def test_hosts_reach_each_other_and_this_process_reaches_them_by_address(three: Bed) -> None:
    one, two, _ = three
    write(one, "host1")  # by name
    write(two, one.address)
    assert three.gateway.rpartition(".")[0] == one.address.rpartition(".")[0]
    subprocess.run([*PYTHON, WRITE, two.address, "1"], check=True, capture_output=True)
    assert one.run(["hostname"]) == "host0\n"
    assert "host2" not in Path("/etc/hosts").read_text()


def test_what_is_on_its_way_arrives_when_its_link_becomes_slower(three: Bed) -> None:
    one, two, _ = three
    before, sending = one.sent(), one.popen([*PYTHON, SEND, two.address])
    assert soon(lambda: one.sent() > before + 5_000_000)
    for rate in ("100mbit", "40mbit"):
        one.link(rate)
    assert sending.wait(20) == 0
    one.link()


def test_a_rate_holds_for_its_direction_and_bytes_are_counted(three: Bed) -> None:
    one, two, _ = three
    one.link(up="400kbit")
    sent, received, back = one.sent(), two.received(), one.received()
    # All but the first burst needs so long at least; nothing is said of at most.
    assert write(one, two.address, 60_000) > 60_000 / 50_000 - 16_000 / 50_000
    assert 60_000 < one.sent() - sent < 80_000
    assert 60_000 < two.received() - received < 80_000
    assert 60_000 < one.received() - back < 80_000
    one.link()
    with pytest.raises(ValueError, match="10mbit"):
        one.link(up="10 Mbit/s")


def test_a_cut_link_is_silent_until_it_is_healed(three: Bed) -> None:
    one, two, other = three
    two.cut()
    waiting = one.popen([*PYTHON, WRITE, two.address, "1000"], stdout=subprocess.PIPE)
    write(one, other.address)  # by which time the first would be back
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.5)
    two.heal()
    waiting.communicate(timeout=60)
    assert waiting.returncode == 0


def test_a_host_that_moves_is_found_at_its_new_address_and_not_at_the_old_one(three: Bed) -> None:
    one, two, _ = three
    old = two.address
    two.move(new := old.rpartition(".")[0] + ".99")
    write(one, new)
    write(one, "host1")
    late = one.popen([*PYTHON, WRITE, old, "1"], stdout=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        late.wait(0.3)
    late.kill()
    assert late.wait(10) == 128 + signal.SIGKILL
    two.move(old)


def test_stop_and_kill_are_for_all_processes_of_one_host(beds: type[Bed]) -> None:
    with beds(2) as (one, two):
        first, second, other = echo(one), one.popen(["sleep", "1000"]), echo(two)
        one.stop()
        assert soon(lambda: "T (stopped)" in Path(f"/proc/{first.inner}/status").read_text())
        one.cont()
        write(two, one.address)
        one.kill()
        assert [p.wait(30) for p in (first, second)] == [137, 137]
        write(one, two.address)  # the host itself lives
        assert other.poll() is None


def test_files_and_user_are_those_of_the_host(beds: type[Bed]) -> None:
    with beds(2, uid=12345) as (one, two):
        one.run(["sh", "-c", "echo here > x; id -u >> x; cp x /tmp/y"])
        assert one.path("x").read_text() == one.path("/tmp/y").read_text() == "here\n12345\n"
        assert not any(path.exists() for path in (two.path("x"), Path("/tmp/y")))
        one.own("/tmp/small", size="64k")
        with pytest.raises(subprocess.CalledProcessError) as caught:
            one.run(["dd", "if=/dev/zero", "of=/tmp/small/x", "bs=1k", "count=100"])
        assert os.strerror(errno.ENOSPC) in caught.value.stderr
        two.path("shared").mkdir(mode=0o777)
        two.path("shared/a").write_text("old")
        two.copy("/tmp/home/shared")
        two.run(["sh", "-c", "echo new > shared/a"], root=True)
        assert two.run(["cat", "shared/a"]) == "new\n"
        assert two.path("shared/a").read_text() == "old"  # what lies below


def left_of(pids: list[int], folder: Path, bed: str) -> list[str]:
    """Give what is left of a bed."""
    left = [str(pid) for pid in pids if Path(f"/proc/{pid}").exists()]
    left += [bed] if Path("/sys/class/net", bed).exists() else []
    return left + ([str(folder)] if folder.exists() else [])


SCRIPT = """if True:
    import os, sys
    from fedraclora.experiments.hosts import Bed
    with Bed(2) as bed:
        run = [bed[0].popen(["sh", "-c", "sleep 1000 & exec setsid sleep 1000"]) for _ in range(2)]
        keepers = [h.inside.pid for h in bed] + [bed[0].switch.pid]
        number = bed.gateway.split(".")[2]
        print(*keepers, *(r.pid for r in run), bed[0].folder.parent, "bed-" + number, flush=True)
        sys.stdin.readline()
        raise SystemExit(3)
"""


@pytest.mark.parametrize("end", [0, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_however_the_process_ends(beds: type[Bed], end: int) -> None:
    line, pipe = [sys.executable, "-c", SCRIPT], subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        *pids, folder, bed = process.stdout.readline().split()
        assert len(left_of([*map(int, pids)], Path(folder), bed)) == len(pids) + 2
        if end:
            process.send_signal(end)
        process.communicate(timeout=60)  # which ends its input
    assert process.returncode == (3 if end == 0 else -end)
    if end == signal.SIGKILL:
        with beds(1):  # removes the folder: the kernel knows nothing of it
            pass
    assert soon(lambda: not left_of([*map(int, pids)], Path(folder), bed))


def test_two_beds_at_once_are_two_networks(beds: type[Bed]) -> None:
    with beds(1) as one, beds(1) as two:
        assert one.gateway != two.gateway
        echo(two[0])
        late = one[0].popen([*PYTHON, WRITE, two[0].address, "1"], stderr=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            late.wait(0.3)
