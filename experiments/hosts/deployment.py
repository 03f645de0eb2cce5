"""A deployment on a bed: a SuperLink on its first host, and a node on each of the others.

Each is started by the commands of docs/deploy.md, with TLS, node keys and a database; a run is
started on the first host, as an operator does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedraclora.engines.deploy.local import make_node_key
from fedraclora.experiments.hosts.bed import Bed
from fedraclora.experiments.hosts.host import HOME, Host
from fedraclora.experiments.hosts.namespaces import Process
from fedraclora.run.ledger import read_ledger

PORT, PROXY_PORT = 8000, 8443
PROJECT = Path(__file__).resolve().parents[2]  # the package has a link to it
COMMAND = [sys.executable, "-m", "fedraclora.commands.cli"]
ENVIRONMENT = {
    "FLWR_HOME": f"{HOME}/flower",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
    "PYTHONUNBUFFERED": "1",
}
RESTART = 10.0  # seconds
PATIENCE = 600.0  # seconds: no measure, it ends what hangs


def wait_for(ready: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait for something; a TimeoutError if it does not come."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come in {seconds:g} s")
        time.sleep(0.1)


class Deployment:
    """Processes of a deployment on the hosts of a bed, and its runs.

    Args:
        bed: Its hosts; host k + 1 is that of client k.
        proxy: Whether nodes reach the SuperLink through a proxy, which has the certificate that
            they see.

    Attributes:
        proxy: The process of the proxy, or None.
        link: The process of the SuperLink.
        nodes: Those of the nodes.
        added: What the environment of each has besides.
    """

    def __init__(self, bed: Bed, *, proxy: bool = False) -> None:
        self.server, *self.owners = bed.hosts
        self.keys = self.server.path("keys")
        self.keys.mkdir()
        self.proxy: Process | None = None
        self.renew_certificate({})
        for k, owner in enumerate(self.owners):
            make_node_key(owner.path("node"))
            shutil.copy(owner.path("node.pub"), self.keys / f"node{k}.pub")
            shutil.copy(self.keys / "ca.crt", owner.path("ca.crt"))
        config = self.server.path("flower/config.toml")
        config.parent.mkdir()
        trust = f'root-certificates = "{HOME}/keys/ca.crt"'
        config.write_text(f'[superlink.house]\naddress = "localhost:{PORT}"\n{trust}\n')
        if proxy:
            module = "fedraclora.experiments.hosts.tls_proxy"
            words = [str(PROXY_PORT), str(PORT), f"{HOME}/keys"]
            self.proxy = self.start(
                self.server, [sys.executable, "-m", module, *words], "proxy.log"
            )
        self.link = self.start_link()
        for k, owner in enumerate(self.owners):
            line = f"flwr supernode register {HOME}/keys/node{k}.pub house --name {owner.name}"
            self.server.run(line.split(), env=ENVIRONMENT, timeout=PATIENCE)
        self.added: list[dict[str, str]] = [{} for _ in self.owners]
        self.died: dict[int, float] = {}
        self.nodes = [self.start_node(k) for k in range(len(self.owners))]

    def renew_certificate(self, environ: Mapping[str, str]) -> None:
        """Make the certificate that nodes see, anew, and have the proxy read it.

        Args:
            environ: What the environment of the script has besides: ``DAYS``, or another clock.
        """
        script = PROJECT / "docs" / "deploy" / "certificates.sh"
        words = ["sh", str(script), self.server.name, str(self.keys)]
        subprocess.run(words, check=True, capture_output=True, env={**os.environ, **environ})
        if self.proxy is not None:
            self.proxy.send_signal(signal.SIGHUP)

    def start(self, host: Host, command: Sequence[str], log: str, **more: str) -> Process:
        """Start a process that writes to a file of its host."""
        with host.path(log).open("a") as file:
            env = {**ENVIRONMENT, **more}
            return host.popen(command, env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL)

    def start_link(self) -> Process:
        """Start the SuperLink on its database, and wait until it listens."""
        own, host = ("server", "0.0.0.0") if self.proxy is None else ("link", "127.0.0.1")
        words = f"--host {host} --port {PORT} --enable-supernode-auth --database {HOME}/link.db"
        for key, file in {
            "ca-certfile": "ca.crt",
            "certfile": f"{own}.pem",
            "keyfile": f"{own}.key",
        }.items():
            words += f" --ssl-{key} {HOME}/keys/{file}"
        process = self.start(self.server, ["flower-superlink", *words.split()], "link.log")
        hexadecimal = f":{PORT:04X} "  # of the table of sockets; state 0A listens
        table = Path(f"/proc/{self.server.inside.pid}/net/tcp")
        wait_for(
            lambda: any(
                hexadecimal in row and " 0A " in row for row in table.read_text().splitlines()
            ),
            "the SuperLink",
        )
        return process

    def start_node(self, k: int) -> Process:
        """Start the node of client ``k``."""
        port = PORT if self.proxy is None else PROXY_PORT
        words = f"--superlink {self.server.name}:{port} --root-certificates ca.crt"
        words += " --auth-supernode-private-key node --node-config"
        config = f"partition-id={k} cache='{HOME}/cache'"
        command = [*COMMAND, "node", *words.split(), config]
        return self.start(self.owners[k], command, "node.log", **self.added[k])

    def supervise(self) -> None:
        """Start nodes that have ended again after 10 s, as their units say."""
        for k, node in enumerate(self.nodes):
            if node.poll() is None:
                self.died.pop(k, None)
            elif time.monotonic() > self.died.setdefault(k, time.monotonic()) + RESTART:
                self.nodes[k] = self.start_node(k)

    def begin(self, words: Sequence[str], *, resume: bool = False) -> Process:
        """Start a run whose folder is ``run`` of the server's home, or go on with it."""
        folders = [f"resume={HOME}/run"] if resume else [f"output.dir={HOME}/run", *words]
        line = [*COMMAND, "deploy", "connection=house", f"engine.folder={HOME}/there", *folders]
        return self.start(self.server, line, "run.log")

    def rows(self) -> list[dict[str, object]]:
        """The server's ledger so far; row 0 is what is measured before the first round."""
        ledger = self.server.path("there/ledger.jsonl")
        return read_ledger(ledger) if ledger.is_file() else []

    def until(self, round_: int, seconds: float = PATIENCE) -> None:
        """Wait until a round has ended; meanwhile nodes that end are started again."""

        def has_ended() -> bool:
            self.supervise()
            return len(self.rows()) > round_

        wait_for(has_ended, f"the end of round {round_}", seconds)
