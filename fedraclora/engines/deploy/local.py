"""Run a whole deployment on this machine: a SuperLink with TLS, and authenticated SuperNodes.

It is for trials and tests. Its files are in one folder that only this user can enter and that is
removed at the end; all processes end with this one.
"""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedraclora.engines.deploy.control import Connection
from fedraclora.engines.flower_patches import SOCKETS
from fedraclora.engines.programs import (
    CONNECTION,
    HOST,
    LINK,
    LONGEST,
    NODE,
    Address,
    Program,
    addresses,
    end_all,
    environment,
    flwr,
    superlink,
)
from fedraclora.errors import EngineError
from fedraclora.private_folder import PrivateFolder

DAYS = 7  # validity of a certificate


class LocalDeployment:
    """Run a SuperLink and SuperNodes on this machine while the context is open.

    Args:
        served: The clients of each node.
        data: Where the nodes find their samples, for runs with ``data=own``; None for others.
        lasting: Whether the SuperLink keeps its database in a file, so that it can be restarted; in
            memory it is faster.
        patched: Whether modules of Flower are patched; otherwise everything is slower, and listens
            at ports that every user of this machine can reach.

    Attributes:
        home: The folder; removed at the end.
        connection: The connection to the SuperLink.
        identity: The certificate and the key of the SuperLink.
        link: The SuperLink, and ``nodes`` the SuperNodes; None for one that does not run.
        at: Where the SuperLink listens, once it is started.
    """

    def __init__(
        self,
        served: Sequence[Sequence[int]],
        data: str | None = None,
        *,
        lasting: bool = False,
        patched: bool = True,
    ) -> None:
        self.served, self.data, self.lasting = served, data, lasting
        self._made = PrivateFolder(longest=LONGEST)
        self.home = self._made.path
        self.environ = environment(self.home, patched=patched)
        self.connection = Connection(CONNECTION, self.environ)
        self.nodes: list[Program | None] = [None] * len(served)
        self.link: Program | None = None
        self.identity = make_identity(self.home / "keys")

    def __enter__(self) -> LocalDeployment:
        """Start all processes, and wait until the SuperLink listens."""
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
        """End all processes."""
        self.close()

    def key(self, k: int) -> Path:
        """Return the path of node ``k``'s private key."""
        return self.home / "keys" / f"node{k}"

    def start_link(self) -> None:
        """Start the SuperLink, on its database if it has one, and wait until it listens."""
        certificate, key = str(self.identity.certificate), str(self.identity.key)
        words = ["--ssl-ca-certfile", certificate, "--ssl-certfile", certificate]
        words += ["--ssl-keyfile", key, "--enable-supernode-auth"]
        if self.lasting:
            words += ["--database", str(self.home / "superlink.db")]
        trust = f'root-certificates = "{certificate}"'
        # Each poll of its SuperExec for a task is a request, and a run is one task.
        environ = {**self.environ, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1"}
        self.link, self.at = superlink(self.home, words, environ, trust)
        self.link.await_listening(self.at)

    def register(self, public: Path) -> None:
        """Register a node's key at the SuperLink.

        Raises:
            EngineError: If it refuses.
        """
        words = ["supernode", "register", str(public), CONNECTION]
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
            config += f" data={json.dumps(self.data)}"  # a JSON string is also a TOML string
        self.nodes[k] = node = self.node(secure, f"node{k}.log", config)
        return node

    def node(self, secure: Sequence[str], log: str, config: str) -> Program:
        """Start a SuperNode with the credentials of node ``k``, or others."""
        path = (self.home / log).with_suffix(".api")
        at, environ = Address.choose(path, NODE, self.environ), dict(self.environ)
        if at.socket is not None:
            environ[SOCKETS] = addresses({LINK: self.home / "link", NODE: path})
        words = [*secure, "--superlink", str(self.at), "--host", HOST, "--port", str(at.port)]
        words += ["--node-config", config]
        return Program("flower-supernode", words, environ, self.home / log)

    def close(self) -> None:
        """End all processes, the nodes first, and remove the folder."""
        end_all([node for node in self.nodes if node is not None])
        end_all([] if self.link is None else [self.link])
        self.nodes, self.link = [None] * len(self.served), None
        self._made.cleanup()


@dataclass(frozen=True)
class Identity:
    """Hold certificate and private key of a server.

    Attributes:
        certificate: PEM file, self-signed, by which clients recognize the server.
        key: PEM file of its private key.
    """

    certificate: Path
    key: Path


def make_identity(folder: Path) -> Identity:
    """Create the key of a server at this machine's own address, and its certificate."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    made = Identity(folder / "server.crt", folder / "server.key")
    made.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    _write_secret(made.key, key, serialization.PrivateFormat.PKCS8)
    return made


def make_node_key(path: Path) -> Path:
    """Create a node's key as Flower needs it: P-384, OpenSSH; the public key is ``<path>.pub``.

    Returns:
        The public key's file.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    _write_secret(path, key, serialization.PrivateFormat.OpenSSH)
    public = path.with_name(f"{path.name}.pub")
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    )
    return public


def _write_secret(
    path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat
) -> None:
    """Write a key to a file that only this user can read, from its first byte on."""
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
