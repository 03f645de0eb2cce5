"""A whole deployment on this machine: a SuperLink with TLS, and SuperNodes that prove who they are.

It is for trying out and for tests. All of it is in one folder that only this user can enter, and
goes with it; all processes are on a tether.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fedraclora.engines.deploy.control import Connection
from fedraclora.engines.deploy.keys import make_identity, make_node_key
from fedraclora.engines.programs import (
    HOST,
    LINK,
    LONGEST,
    NAME,
    NODE,
    Program,
    addresses,
    end_all,
    environment,
    flwr,
    superlink,
)
from fedraclora.engines.sockets import VARIABLE
from fedraclora.errors import EngineError
from fedraclora.temporary import PrivateFolder

SUPERNODE = Path(__file__).with_name("supernode.py")


class LocalDeployment:
    """A SuperLink and SuperNodes; as a context they run inside, and are gone after.

    Args:
        served: The clients of each node.
        data: Where the nodes find their samples, for runs with ``data=own``; None for others.
        lasting: Whether the SuperLink keeps what it knows in a file, so that it may be started
            again; in memory it answers sooner.

    Attributes:
        home: The folder; gone after the end.
        connection: To it.
        identity: The certificate and the key of the SuperLink.
        link: The SuperLink, and ``nodes`` the SuperNodes; None where one does not run.
    """

    def __init__(
        self, served: Sequence[Sequence[int]], data: str | None = None, *, lasting: bool = False
    ) -> None:
        self.served, self.data, self.lasting = served, data, lasting
        self._made = PrivateFolder(longest=LONGEST)
        self.home = self._made.path
        # Each look of the SuperLink's SuperExec for a task is a request, and a run is one task.
        self.environ = {**environment(self.home), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1"}
        self.connection = Connection(NAME, self.environ)
        self.nodes: list[Program | None] = [None] * len(served)
        self.link: Program | None = None
        self.identity = make_identity(self.home / "keys")

    def __enter__(self) -> LocalDeployment:
        """Start everything, and wait until the SuperLink listens."""
        try:
            self.start_link()
            for k in range(len(self.served)):
                self.register(make_node_key(self.key(k)))
                self.start_node(k)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End everything."""
        self.close()

    def key(self, k: int) -> Path:
        """The private key of node ``k``."""
        return self.home / "keys" / f"node{k}"

    def start_link(self) -> None:
        """Start the SuperLink, on its database if it has one, and wait until it listens."""
        certificate, key = str(self.identity.certificate), str(self.identity.key)
        words = ["--ssl-ca-certfile", certificate, "--ssl-certfile", certificate]
        words += ["--ssl-keyfile", key, "--enable-supernode-auth"]
        if self.lasting:
            words += ["--database", str(self.home / "superlink.db")]
        trust = f'root-certificates = "{certificate}"'
        self.link = superlink(self.home, words, self.environ, trust)
        self.link.await_listening(self.home / "link")

    def register(self, public: Path) -> None:
        """Register a node's key at the SuperLink.

        Raises:
            EngineError: If it refuses.
        """
        words = ["supernode", "register", str(public), NAME]
        done = flwr(words, self.environ, stderr=subprocess.PIPE)
        if done.returncode:
            raise EngineError(
                f"the SuperLink did not register a node: {(done.stdout + done.stderr).strip()}"
            )

    def start_node(self, k: int) -> Program:
        """Start SuperNode ``k``."""
        ids = ",".join(map(str, self.served[k]))
        secure = ["--root-certificates", str(self.identity.certificate)]
        secure += ["--auth-supernode-private-key", str(self.key(k))]
        config = f"partition-ids='{ids}'"
        if self.data is not None:
            config += f" data={json.dumps(self.data)}"  # a JSON string is a TOML string, too
        self.nodes[k] = node = self.node(secure, f"node{k}.log", config)
        return node

    def node(self, secure: Sequence[str], log: str, config: str) -> Program:
        """Start a SuperNode with some credentials: those of node ``k``, or others."""
        words = [*secure, "--superlink", f"{HOST}:{LINK}", "--host", HOST, "--port", str(NODE)]
        words += ["--node-config", config]
        own = {LINK: self.home / "link", NODE: (self.home / log).with_suffix(".api")}
        environ = {**self.environ, VARIABLE: addresses(own)}
        return Program("flower-supernode", words, environ, self.home / log, SUPERNODE)

    def close(self) -> None:
        """End everything, the nodes first, and remove the folder."""
        end_all([node for node in self.nodes if node is not None])
        end_all([] if self.link is None else [self.link])
        self.nodes, self.link = [None] * len(self.served), None
        self._made.cleanup()
