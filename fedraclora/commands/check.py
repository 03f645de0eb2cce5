"""``--check`` of `node` and `deploy`: find problems before a run. Nothing is started or sent.

Each check prints one line: a tick with its result, a cross with the remedy, or an exclamation mark
with a possible problem that this machine cannot verify.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shutil
import socket
import ssl
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import click
import httpx
import torch
import yaml
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, RecordDict

from fedraclora import flower_internals
from fedraclora.clients.cache import RUNS, cache_of, claim, on_disk
from fedraclora.clients.node import trainer_for
from fedraclora.commands.app import ServerRun, owner_request
from fedraclora.commands.status import explained, in_one_piece
from fedraclora.config.build import measured_samples
from fedraclora.data.per_client import read_own
from fedraclora.engines.deploy.control import Connection
from fedraclora.engines.flower_patches import ANY, EARLY, OLDEST, patch
from fedraclora.engines.node_config import served
from fedraclora.engines.owner.gate import ASK
from fedraclora.engines.owner.policy import Policy
from fedraclora.errors import ConfigError, EngineError, FedRacLoraError
from fedraclora.run.folder import versions_of
from fedraclora.terminal.opening import OR_CLIENTS, UNMEASURED
from fedraclora.training.chunking import HOST_BYTES
from fedraclora.trust import names_in, refuse_unsaid

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
ADVICE: dict[type[BaseException], str] = {
    socket.gaierror: "this host name is unknown here: check --superlink, or /etc/hosts",
    ssl.SSLCertVerificationError: "its certificate must be for the name in --superlink, signed by "
    "--root-certificates, and valid by this clock",
    ssl.SSLError: "the server there does not use TLS, or --root-certificates has no certificate",
    TimeoutError: "no answer: does a firewall block it?",
    PermissionError: "anyone with the certificate could start code on this host. Ask the "
    "operator to forward that path only",
    BaseException: "check HOST:PORT of --superlink, and that the SuperLink and its proxy run",
}


class Checklist:
    """Runs checks and prints a line for each; ``failed`` is the exit status of the command."""

    def __init__(self) -> None:
        self.failed = 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[object], None]]:
        """Print the result of one check: of what its block passes to ``say``, or raises."""
        results: list[object] = []
        mark = "\N{CHECK MARK}"
        try:
            yield results.append
        except UserWarning as doubt:
            mark, results = "!", [doubt]
        except Exception as error:
            if (why := explained(error)) is None:
                raise
            mark, results, self.failed = "\N{BALLOT X}", [why], 1
        print(f"{mark} {name}: {in_one_piece('; '.join(map(str, results)))}", flush=True)

    def versions(self, wanted: Mapping[str, object]) -> dict[str, str]:
        """Compare installed versions with those of a run, ignoring the build of torch."""
        found = {"Python": platform.python_version().rpartition(".")[0]}
        found |= versions_of(("fedraclora", "flwr", "torch", "numpy"))
        with self("versions") as say:
            for name, version in wanted.items():
                if found.get(name, "").partition("+")[0] != str(version).partition("+")[0]:
                    raise ConfigError(
                        f"{name} is {found.get(name)}, and the run has {version}: install that"
                    )
            say(", ".join(f"{name} {version}" for name, version in found.items()))
        return found


def check_run(run: ServerRun, connection: Connection | None, file: str | None) -> int:
    """Check a run from the operator's side, and the connected nodes; write ``file``."""
    look, config = Checklist(), run.config
    versions = look.versions({})
    with look("run") as say:
        digest = owner_request(run).digest
        if file is not None:
            found = {"versions": versions, "config": config.plain, "digest": digest}
            text = yaml.safe_dump(found)
            Path(file).write_text(text, encoding="utf-8")
        built, rounds = run.built, config.rounds
        say(f"clients={built.clients}, clients_per_round={built.cohort}, rounds={rounds}")
    with look("digest, which owners approve") as say:
        say(digest)
    with look("metrics") as say:
        known = measured_samples(built.task, run.config.evaluate.split)
        if not len(known) and built.task.held is None:
            raise UserWarning(UNMEASURED + OR_CLIENTS)
        say(", ".join(built.task.measured))
    address = "" if connection is None else str(connection.known().get(connection.name, ""))
    if address.rpartition(":")[0].strip("[]") in LOOPBACK:
        with look("folder") as say:
            folder = Path(str(run.config.output.dir)).expanduser()
            near = next(path for path in (folder, *folder.parents) if os.access(path, os.F_OK))
            if not (near.is_dir() and os.access(near, os.W_OK | os.X_OK)):
                raise UserWarning(
                    f"{folder}: this user cannot write to {near}, and the SuperLink's user "
                    "(perhaps another) must. Choose another engine.folder."
                )
            say(folder)
    if connection is not None:
        with look("nodes") as say:
            # Only a running app learns which clients they serve.
            states = [str(node["status"]) for node in connection.nodes()]
            say(", ".join(f"{states.count(each)} {each}" for each in sorted({*states})))
            if "online" not in states:
                advice = "register the owners' keys, and have each run `fedraclora node --check`"
                raise EngineError(f"{len(states)} are registered, and none is online: {advice}")
            if (online := states.count("online")) < built.clients:
                raise UserWarning(
                    f"{online} online for {built.clients} clients: some must serve several "
                    "(partition-ids), which only a run can check"
                )
    return look.failed


def check_node(words: Sequence[str], file: str | None, policy: str | None = None) -> int:
    """Check a node from its owner's side.

    Args:
        words: The arguments of Flower's program.
        file: The file that `check_run` wrote, or None.
        policy: The owner's file of approved runs, or None.
    """
    args = flower_internals.node_arguments(words)
    wanted: dict[str, Any] = {"versions": {}, "config": {}}
    try:
        config = flower_internals.node_config(args.node_config)
        if file is not None:
            wanted = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        versions, plain = dict(wanted["versions"]), dict(wanted["config"])
        digest = wanted.get("digest")
    except (click.ClickException, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        meant = (
            f"--check={file} must be the file that the operator's `fedraclora deploy "
            "--check=FILE` wrote"
        )
        raise ConfigError(f"--node-config {args.node_config}, or {meant}: {error}") from error
    refuse_unsaid(file, names_in(plain))
    look = Checklist()
    look.versions(versions)
    of_superlink(look, args)
    of_approval(look, digest, policy)
    of_clients(look, Context(0, 0, config, RecordDict(), {}), plain)
    return look.failed


def of_superlink(look: Checklist, args: Namespace) -> None:
    """Check the connection, key and clock of a node against its SuperLink."""
    key = found = None
    if args.auth_supernode_private_key is not None:
        with look("key") as say:
            key = read_key(Path(args.auth_supernode_private_key).expanduser())
            form = serialization.PublicFormat.OpenSSH
            public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, form).decode()
            digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
            say(f"SHA256:{base64.b64encode(digest).decode().rstrip('=')} of {public}")
    with look("address") as say:
        found, certificate = query_superlink(args, key or ec.generate_private_key(ec.SECP384R1()))
        until = f"a certificate until {certificate['notAfter']}" if certificate else "no TLS"
        say(f"{args.superlink}, with {until}")
    if found is None:
        return
    with look("SuperLink") as say:
        if key is None and args.auth_supernode_private_key is not None:
            raise UserWarning("not asked whether it knows the key, since the key cannot be read")
        state = flower_internals.key_state(found.text)
        if state == flower_internals.UNKNOWN and key is not None:
            raise EngineError("it does not know the key: send the public part to the operator")
        if state is None:
            why = "ask the operator whether the proxy forwards this path to a SuperLink that runs"
            why = "is the clock right?" if found.status_code == httpx.codes.UNAUTHORIZED else why
            raise EngineError(f"status {found.status_code} for /v1/fleet/: {why}")
        say("it may ask for a key" if key is None else "it knows the key")
    with look("clock") as say:
        server_time = parsedate_to_datetime(found.headers["date"])
        ahead = (datetime.now(UTC) - server_time).total_seconds()
        offset = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the SuperLink's"
        if not -OLDEST < ahead < EARLY:
            limits = f"{OLDEST} s behind to {EARLY} s ahead"
            raise EngineError(f"{offset}, but Flower accepts {limits}: set the clock")
        say(offset)


def of_approval(look: Checklist, digest: object, policy: str | None) -> None:
    """Check whether the owner has approved a run, if its digest is known."""
    if digest is None:
        return
    with look("approval") as say:
        if policy is None:
            raise UserWarning(f"the digest is {digest}; without --approve=FILE every run may train")
        if policy == ASK or digest not in Policy.read(Path(policy).expanduser()).approved:
            where = "this node will ask" if policy == ASK else f"it is not in {policy}"
            raise UserWarning(f"the digest is {digest}; {where}")
        say(f"{policy} has the digest {digest}")


def read_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """Read the private key of a node; reject a kind or permissions that Flower does not accept."""
    make = 'make one: ssh-keygen -t ecdsa -b 384 -N "" -f FILE'
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("of another kind")
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: a passphrase
        raise ConfigError(f"{file} is not a key that Flower accepts ({error}); {make}") from error
    found = file.stat()
    # A file of another user (root) is readable here through its group.
    mode, group = found.st_mode & 0o777, 0o070 * (found.st_uid == os.geteuid())
    if mode & (0o007 | group):
        raise ConfigError(f"{file} has mode {mode:o}, so that others may use it: chmod 600 {file}")
    return key


def query_superlink(args: Namespace, key: ec.EllipticCurvePrivateKey) -> tuple[httpx.Response, Any]:
    """Ask a SuperLink whether it knows a key; return its response and its certificate."""
    patch(ANY)
    roots = None
    if args.root_certificates is not None and not args.insecure:
        roots = Path(args.root_certificates).read_bytes()
    address, cause = args.superlink, BaseException()
    activation = flower_internals.refused_activation
    try:
        with activation(address, key, roots, insecure=args.insecure) as refusal:
            if refusal is not None:
                found, web = refusal
                link = found.extensions["network_stream"].get_extra_info("ssl_object")
                reachable = web.get(found.url.copy_with(path="/health")).is_success
                if not reachable or found.url.host in LOOPBACK:
                    return found, link and link.getpeercert()
                cause = PermissionError("more than /v1/fleet/ can be reached")
    except (httpx.TransportError, httpx.InvalidURL, ValueError, OSError) as error:
        cause = error
        while deeper := cause.__cause__ or cause.__context__:
            cause = deeper
    advice = next(text for kind, text in ADVICE.items() if isinstance(cause, kind))
    raise EngineError(f"{address}: {cause}: {advice}")


def of_clients(look: Checklist, context: Context, plain: dict[str, Any]) -> None:
    """Check the data of a node's clients, and free disk and memory; ``plain``: config or {}."""
    own, weights, ids = context.node_config.get("data"), 0, list[int]()
    with look("data") as say:
        ids = served(context.node_config)
        alone, source = own is not None and len(ids) == 1, None if own is None else str(own)
        wrong = list[str]()
        for client in ids:
            if source is None or plain.get("data", {}).get("objects"):
                say(f"client {client}")
                continue
            try:
                found, _ = read_own(source, client, alone=alone)
            except FedRacLoraError as error:
                wrong.append(str(error))
                continue
            shapes = ", ".join(f"{n} {list(t.shape[1:])}" for n, t in found.inputs.items())
            kinds = len(found.target.unique())
            say(f"client {client}: {len(found)} samples, {shapes}, {kinds} values of target")
        if wrong:  # one error names them all
            raise ConfigError("; ".join(dict.fromkeys(wrong)))
        if plain:
            trainer, _ = trainer_for(json.dumps(plain), source, tuple(ids))
            trainer.data.sizes(torch.tensor(ids))  # reads the samples, as a round does
            weights = sum(p.nbytes for p in trainer.task.model.parameters())
        say("as the run wants them" if plain else "not compared with a run (--check=FILE)")
    with look("cache") as say:
        claim(folder := cache_of(context))
        with on_disk(folder), tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
        need = max(100 << 20, weights * RUNS)  # one copy of a run serves all clients
        say(compare_free(shutil.disk_usage(folder).free, need, f"on the disk of {folder}"))
    with look("memory") as say:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable"))
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        if limit.is_file() and (most := limit.read_text().strip()).isdecimal():  # of a container
            free = min(free, int(most) - int(used.read_text()))
        say(compare_free(free, HOST_BYTES + weights, "of memory"))


def compare_free(free: int, need: int, of: str) -> str:
    """Describe free and needed bytes; raise an error if too few are free."""
    text = f"{free / 1e6:.0f} MB {of} are free, {need / 1e6:.0f} MB are needed"
    if free < need:
        raise ConfigError(f"{text}: make room")
    return text
