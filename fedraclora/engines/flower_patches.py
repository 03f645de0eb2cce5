"""Patch Flower's modules: the table `PATCHES`, and the replacements.

``python -P flower_patches.py PROGRAM WORD ...`` runs one of Flower's programs with its patches.
Each patch records how Flower 1.42 uses the replaced names. This is compared with the source of the
installed Flower; if it differs, the patch is not applied, and a line says so. Without patches
everything works, but slower: `UNPATCHED` in the environment disables some, or all.

It runs as a file, without this project, since an app imports its own copy of the project.
"""

from __future__ import annotations

import ast
import ctypes
import gc
import hashlib
import json
import math
import mmap
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

UNPATCHED = "FEDRACLORA_UNPATCHED"  # environment variable: patches not to apply, or `ALL`
ALL = "all"
OWNED = "FEDRACLORA_OWNER"  # environment variable of a node: what its data owner asks for, as JSON
SOCKETS = "FEDRACLORA_SOCKETS"  # environment variable: addresses that are Unix sockets, as JSON
# Flower's programs, by their commands.
LINK, NODE, EXECUTOR = "flower-superlink", "flower-supernode", "flower-superexec"
CLIENT_APP = "flwr-clientapp"
NODE_EXECUTOR = f"{EXECUTOR} of a node"  # the same as `EXECUTOR`, with the patches of a node
FLWR = "flwr"  # Flower's command line
SERVER = "the server of a run"  # in the process that Flower starts for its ServerApp
ANY = "any other program"
ADDRESS = ("127.0.0.1", "2")  # placeholder for the socket of a node's own API
LONGEST_PATH = 80  # most characters of a folder's path: that of a socket in it may have 107
TOKEN = "--token"  # noqa: S105  a word of the programs for tasks; its value is the secret
INSTALLED = 1 << 13  # bytes of a digest and a path
EARLY, OLDEST = 5, 300  # seconds by which Flower allows clocks to differ
UNKNOWN_KEY = (
    "the SuperLink refuses this node: its key is not registered, or a node with this key was "
    "killed less than a minute ago. Send the public key to the operator, who runs `flwr "
    "supernode register`, or wait a minute"
)
REMOVED_KEY = (
    "the SuperLink refuses this running node: it does not know its key any more. The operator "
    "removed it (`fedraclora federation remove`), or the SuperLink lost its database. Ask the "
    "operator; to take part again, have the key registered and start this node again"
)
CERTIFICATE_ENDED = (
    "the certificate of the SuperLink, or of its authority, has expired by the clock of this "
    "machine. If that clock is right, tell the operator, who renews it; this node tries again"
)
FAILING = 60.0  # seconds in which a SuperLink that fails may recover
LINK_LOST = "this node has given its connection to the SuperLink up, see above: start it again"
PR_SET_PDEATHSIG = 1  # constant of prctl: the signal that a process receives when its parent ends
LEAST = 0.1  # seconds between polls that are requests
WITHIN = 0.005  # seconds between polls of this process's memory
WOKEN = 1.0  # seconds of a pause that a message ends
SHARE = 0.1  # share of the time since the last event that a pause may add
LONGEST = 2.0  # seconds between polls for a part of a reply
PART = 1 << 16  # bytes of a request that are written at once
WAKE = (
    "FEDRACLORA_WAKE"  # environment variable of a node's SuperExec: the end of a pipe that wakes it
)
WAKES = list[int]()  # the same for its SuperNode
UNTIL = ContextVar("UNTIL", default=math.inf)  # when to stop waiting for parts of a reply


@dataclass(frozen=True, eq=False)
class Patch:
    """Define names of Flower's modules that are replaced together, or not at all.

    Attributes:
        name: Its name in the environment variable and the documentation.
        buys: Its purpose.
        uses: How a module uses each replaced name (`uses_of`), by ``module:name``.
        takes: Arguments of functions that the replacement calls (`arguments_of`), by
            ``module:function``.
        programs: The function that applies it, by program.
    """

    name: str
    buys: str
    uses: Mapping[str, str]
    programs: Mapping[str, Callable[[], None]] = field(repr=False)
    takes: Mapping[str, str] = field(default_factory=dict)


def uses_of(source: str, name: str) -> str:
    r"""Return how a module uses a name: its attributes, and the form of its calls.

    Example:
        >>> uses_of("time.sleep(3)\nrun(time, at=time.now)", "time")
        'time; time.now; time.sleep(_)'
    """
    tree, found = ast.parse(source), dict[int, str]()
    for node in ast.walk(tree):  # from the outside in: a call comes before its function
        called = node.func if isinstance(node, ast.Call) else node
        inner = called.value if isinstance(called, ast.Attribute) else called
        if isinstance(inner, ast.Name) and inner.id == name and id(inner) not in found:
            words = f"({_words(node)})" if isinstance(node, ast.Call) else ""
            found[id(inner)] = ast.unparse(called) + words
    return "; ".join(sorted({*found.values()}))


def _words(call: ast.Call) -> str:
    """Write the form of a call's arguments."""
    words = ["*_" if isinstance(word, ast.Starred) else "_" for word in call.args]
    return ", ".join([*words, *(word.arg or "**_" for word in call.keywords)])


def arguments_of(source: str, qualified: str) -> str:
    r"""Return the arguments of a function of a module; empty if there is none.

    Example:
        >>> arguments_of("class C:\n def f(self, a: int, *, b=1): ...", "C.f")
        'self, a, *, b'
    """
    body: list[ast.stmt] = ast.parse(source).body
    found: Any = None
    for part in qualified.split("."):
        found = next((s for s in body if getattr(s, "name", None) == part), None)
        body = getattr(found, "body", [])
    if not isinstance(found, ast.FunctionDef):
        return ""
    taken = found.args
    words = [arg.arg for arg in (*taken.posonlyargs, *taken.args)]
    words += [f"*{taken.vararg.arg}"] if taken.vararg else ["*"] * bool(taken.kwonlyargs)
    words += [arg.arg for arg in taken.kwonlyargs]
    return ", ".join([*words, *([f"**{taken.kwarg.arg}"] if taken.kwarg else [])])


@cache
def source_of(module: str) -> str:
    """Read the source of a Flower module without importing it; empty if there is none."""
    first, *rest = module.split(".")
    found = find_spec(first)
    for home in [] if found is None else found.submodule_search_locations or []:
        path = Path(home, *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.read_text(encoding="utf-8")
    return ""


@cache
def patch_mismatch(patch: Patch) -> str | None:
    """Return how the installed Flower differs from the one a patch expects; None if it does not."""
    for form, wanted in (("uses", patch.uses), ("takes", patch.takes)):
        look = uses_of if form == "uses" else arguments_of
        for place, known in wanted.items():
            module, _, name = place.partition(":")
            if (now := look(source_of(module), name)) != known:
                what = module if form == "uses" else place
                return f"{what} {form} `{now or 'nothing'}`, expected `{known}`"
    return None


def why_without(patch: Patch, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return why a patch is left out; None if it is applied.

    Args:
        patch: One of `PATCHES`.
        environ: Environment of the patched program.

    Raises:
        SystemExit: If `UNPATCHED` has an unknown name.
    """
    asked = {name for name in environ.get(UNPATCHED, "").replace(" ", "").split(",") if name}
    known = [ALL, *(each.name for each in PATCHES)]
    if unknown := asked.difference(known):
        sys.exit(f"{UNPATCHED}={environ[UNPATCHED]}: {min(unknown)} is none of {', '.join(known)}")
    if asked & {ALL, patch.name}:
        return f"{UNPATCHED}={environ[UNPATCHED]}"
    if (why := patch_mismatch(patch)) is None:
        return None
    return f"flwr {metadata.version('flwr')}: {why}"


def lines(environ: Mapping[str, str] = os.environ) -> list[str]:
    """List patches of Flower that are not applied, one line for each reason."""
    names = dict[str, list[str]]()
    for each in PATCHES:
        if (why := why_without(each, environ)) is not None:
            names.setdefault(why, []).append(each.name)
    found = [f"Flower's patches {', '.join(own)} are left out: {w}" for w, own in names.items()]
    if any(AT_SOCKETS.name in own for own in names.values()):
        found.append("without sockets Flower listens at ports that every user here can reach")
    return found


def patch(program: str) -> None:
    """Patch Flower's modules in this process, for one of its programs.

    Raises:
        SystemExit: If addresses are sockets (`SOCKETS`), which this Flower does not support.
    """
    for each in PATCHES:
        if (replace := each.programs.get(program, each.programs.get(ANY))) is None:
            continue
        if (why := why_without(each)) is None:
            replace()
        elif each is AT_SOCKETS and sockets():
            sys.exit(f"{SOCKETS} is set, but the patch `{each.name}` is left out ({why})")


def put(module: str, **names: object) -> None:
    """Replace names of a module of Flower."""
    found = import_module(module)
    for name, value in names.items():
        getattr(found, name)
        setattr(found, name, value)


# --- sockets: keep the APIs of Flower's programs out of reach of other users of the machine


def sockets() -> dict[str, str]:
    """Read which addresses are sockets, and their paths.

    Raises:
        SystemExit: If they cannot be read: then no program may listen or connect.
    """
    text = os.environ.get(SOCKETS, "{}")
    try:
        return {str(address): str(path) for address, path in json.loads(text).items()}
    except (ValueError, AttributeError):
        sys.exit(f'{SOCKETS}={text}: JSON like {{"127.0.0.1:8000": "/run/link/api"}} is wanted')


def listening(make: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a web-server factory so that the server listens at its address's socket."""

    def made(*words: Any, host: str, port: int, **named: Any) -> Any:
        return make(*words, host=host, port=port, uds=sockets().get(f"{host}:{port}"), **named)

    return made


def calling(*, verify: Any = True, **named: Any) -> Any:
    """Build an HTTP client that uses the socket of an address, if there is one."""
    import httpx

    known = httpx.create_ssl_context(verify) if isinstance(verify, str) else verify
    mounts = {
        f"all://{address}": httpx.HTTPTransport(uds=path, verify=known)
        for address, path in sockets().items()
    }
    return httpx.Client(verify=known, mounts=mounts, **named)


def call_sockets() -> None:
    """Make a program of Flower connect to sockets, if there are any."""
    if sockets():
        import httpx

        put(CLIENT, httpx=SimpleNamespace(**{**vars(httpx), "Client": calling}))


def link_at_socket() -> None:
    """Make the SuperLink listen at a socket, and its child processes connect there."""
    if sockets():
        import uvicorn

        call_sockets()
        late = subprocess.TimeoutExpired
        put(SUPERLINK, uvicorn=SimpleNamespace(run=listening(uvicorn.run)))
        put(SUPERLINK, subprocess=SimpleNamespace(Popen=start, TimeoutExpired=late))


def node_at_socket() -> None:
    """Make the SuperNode listen at a socket, and its SuperExec connect there."""
    if sockets():
        import uvicorn

        call_sockets()
        made = SimpleNamespace(Server=uvicorn.Server, Config=listening(uvicorn.Config))
        put(SUPERNODE, uvicorn=made)
        start_own_executor()


def executor_at_socket() -> None:
    """Make the SuperExec and its child processes connect to a socket."""
    if sockets():
        call_sockets()
        start_tasks()


def start(words: Sequence[str], **named: Any) -> subprocess.Popen[bytes]:
    """Start another of Flower's programs through this file, with its token in a private file."""
    words = list(words)
    if TOKEN in words:
        at = words.index(TOKEN)
        with tempfile.NamedTemporaryFile("w", prefix="token-", delete=False) as file:
            file.write(words[at + 1])
        words[at : at + 2] = [f"{TOKEN}-file", file.name]
    return subprocess.Popen([sys.executable, "-P", __file__, *words], **named)  # noqa: S603


def start_own_executor() -> None:
    """Make the SuperNode start its SuperExec through this file."""

    def popen(words: Sequence[str]) -> subprocess.Popen[bytes]:
        handles = [int(os.environ[WAKE])] if WAKE in os.environ else []
        own = [NODE_EXECUTOR if word == EXECUTOR else word for word in words]
        return start(own, pass_fds=handles)

    put(NODE_LOOP, subprocess=SimpleNamespace(Popen=popen))


def start_tasks() -> None:
    """Make the SuperExec start the process for a message by a fork, or through this file."""

    def popen(words: Sequence[str], **named: Any) -> None:
        if FORKS and words[0] == CLIENT_APP:
            FORKS[0].send(json.dumps(words).encode())
        else:
            start(words, **named)

    put(TASKS, subprocess=SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))


# --- pauses: short while there is work


class Pauses:
    """Polling pauses: short while there is work, longer when idle."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def note(self) -> None:
        """Record that there was work."""
        self.last = time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Pause for at most some seconds: Flower's pauses below 1 s are within this process."""
        least = WITHIN if seconds < 1 else LEAST
        time.sleep(min(seconds, max(least, SHARE * (time.monotonic() - self.last))))


def node_pauses() -> None:
    """Use such pauses in the SuperNode, and wake its SuperExec when a message arrives.

    Otherwise a SuperExec that polls often takes a message whose parts have not arrived yet, and the
    process that it starts pauses for a second.
    """
    pauses, (asleep, wake) = Pauses(), os.pipe()
    os.environ[WAKE] = str(asleep)
    push = import_module(NODE_LOOP)._push_messages  # noqa: SLF001

    def push_messages(*words: Any, **named: Any) -> None:  # called with every message
        pauses.note()
        os.write(wake, b".")
        push(*words, **named)
        pauses.note()

    put(NODE_LOOP, time=SimpleNamespace(sleep=pauses.sleep), _push_messages=push_messages)
    start_own_executor()


def executor_pauses() -> None:
    """Make the SuperExec of a node pause until there is a message, or for long."""
    asleep = int(os.environ.pop(WAKE))

    def sleep(seconds: float) -> None:
        woken, _, _ = select.select([asleep], [], [], max(seconds, WOKEN))
        if woken and not os.read(asleep, 1 << 10):  # the SuperNode has ended
            time.sleep(seconds)

    put(EXECUTOR_LOOP, time=SimpleNamespace(sleep=sleep))


# --- fork: start the process for a message from one that has already imported Flower

FORKS = list[socket.socket]()  # the process that receives command lines of such processes


def fork_tasks() -> None:
    """Fork the process that forks message processes, and make the SuperExec of a node use it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:  # before there are threads
        ours.close()
        end_after(lambda: run_clientapps(theirs))
    theirs.close()
    end_with_parent()
    FORKS.append(ours)
    start_tasks()


def run_clientapps(asked: socket.socket) -> None:
    """Fork a process that runs ``flwr-clientapp`` for each command line received.

    Args:
        asked: A pipe with them, as JSON; when its other end closes, this process ends.
    """
    from flwr.supernode.cli import flwr_clientapp

    patch(CLIENT_APP)
    import_module("httpcore")  # httpx imports this with its first client
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C goes to the whole group
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for them
    gc.freeze()  # otherwise each process would copy all memory that it shares with this one
    while words := asked.recv(1 << 16):
        if os.fork() == 0:
            asked.close()
            end_with_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.argv = json.loads(words)
            end_after(flwr_clientapp)


def end_after(run: Callable[[], None]) -> NoReturn:
    """Run a function, then exit at once, without the slow shutdown of the interpreter."""
    status: object = None
    try:
        run()
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def end_with_parent() -> None:
    """Request SIGTERM when the parent process ends.

    Flower's own watch signals a thread, which does not end long pauses.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


# --- install: unpack an app only once


def once(install: Callable[..., Path]) -> Callable[..., None]:
    """Skip the installation of an app that the process of an earlier message installed.

    Flower unpacks and checks all files of an app for every message, even if it is installed.
    Processes forked from this one share the last installed app, and its folder.

    Args:
        install: Flower's function; it takes the bytes of an app, and returns its folder.
    """
    last = mmap.mmap(-1, INSTALLED)

    def installed(app: bytes, **named: Any) -> None:
        digest = hashlib.sha256(app).hexdigest()
        found, _, folder = os.fsdecode(last[:].rstrip(b"\0")).partition(" ")
        if found != digest or not Path(folder).is_dir():
            last[:] = os.fsencode(f"{digest} {install(app, **named)}").ljust(INSTALLED, b"\0")

    return installed


def install_once() -> None:
    """Make forked message processes install an app only once."""
    from flwr.cli.install import install_from_fab

    put(APP, install_from_fab=once(install_from_fab))


# --- resend, slow_links, retries: handle slow or broken connections


def sending_all_parts(push: Callable[..., None], refused: type[Exception]) -> Callable[..., None]:
    """Send the other parts of a reply, too, if one is refused.

    A part is sent again if its reply was lost with the connection. The SuperLink already has it,
    and refuses it; Flower would then skip the other parts, and the run would wait three minutes for
    them.

    Args:
        push: Flower's function; it takes the parts, and a function that sends one.
        refused: The error that this raises.
    """

    def push_parts(parts: object, push_object_fn: Callable[[str, bytes], None]) -> None:
        def push_part(name: str, content: bytes) -> None:
            with suppress(refused):
                push_object_fn(name, content)

        push(parts, push_part)

    return push_parts


def resend() -> None:
    """Make the SuperNode send all parts of a reply."""
    from flwr.supercore.inflatable import inflatable_utils as parts

    push = sending_all_parts(parts.push_object_contents_from_iterable, parts.ObjectPushError)
    put(NODE_LOOP, push_object_contents_from_iterable=push)


def in_parts(client: Any) -> Any:
    """Give each `PART` of a request the 30 s that Flower gives to a whole request.

    With TLS a write ends when all of it is sent. Below 3 Mbit/s two parallel writes of 5 MB never
    finished.

    Args:
        client: Flower's class.
    """
    from httpx import Request

    def send(self: Any, context: Any, **named: Any) -> Any:
        content = context.request.content
        parts = (content[k : k + PART] for k in range(0, len(content), PART))
        context.request.stream = Request("POST", "", content=parts).stream
        return client._send(self, context, **named)  # noqa: SLF001

    return type(client.__name__, (client,), {"_send": send})


def send_in_parts() -> None:
    """Make the SuperNode write requests in parts."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    put(FLEET, FleetHttpClient=in_parts(FleetHttpClient))


def patient(make: Callable[[], Any]) -> Callable[[], Any]:
    """Make a node retry also if its connection broke during the TLS handshake.

    Flower treats every error with TLS in its text as a wrong certificate, and ends the node. It
    also ends a node whose signatures are refused; here the reason is printed.

    Args:
        make: Flower's function; it creates the retrier, and asks its ``should_giveup`` about each
            error.
    """
    from flwr.supercore.error import ApiErrorCode, FlowerError

    def made() -> Any:
        retries = make()
        gives_up, failing = retries.should_giveup, FailingSuperLink()

        def should_giveup(error: Exception) -> bool:
            answer: Any = getattr(error, "response", None)
            if getattr(answer, "status_code", 0) == 401:
                begins = answer.request.url.path.endswith("/activate-node")
                told = off(answer.headers)
                if told or not begins:  # Flower ends a running node without a message
                    sys.stderr.write(f"{told or REMOVED_KEY}\n")
                if told and begins:
                    return True
            code = getattr(FlowerError.from_json(getattr(answer, "text", None)), "code", 0)
            if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                sys.stderr.write(f"{UNKNOWN_KEY}\n")
            if getattr(answer, "status_code", 0) == 500 and failing.may_recover():
                return False  # as where its database is locked
            if getattr(answer, "status_code", 0) == 413:
                sys.stderr.write(f"{too_large(answer.request.headers)}\n")
            if "certificate has expired" in str(error):
                sys.stderr.write(f"{CERTIFICATE_ENDED}\n")
                return False
            broke = "handshake operation timed out" in str(error) or "EOF" in str(error)
            return not broke and gives_up(error)

        retries.should_giveup = should_giveup
        return retries

    return made


class FailingSuperLink:
    """How long a SuperLink has answered that it failed (HTTP 500), without a pause of a minute."""

    def __init__(self) -> None:
        self.since = self.last = -math.inf

    def may_recover(self) -> bool:
        """Take down a failure now; return whether it is worth to try again."""
        now = time.monotonic()
        self.since = now if now > self.last + FAILING else self.since
        self.last = now
        return now < self.since + FAILING


def off(headers: Mapping[str, str]) -> str:
    """Return by how much the clock is off, if Flower refuses signatures for that; else empty.

    Args:
        headers: Headers of a reply; their date is that of the SuperLink's clock.
    """
    there = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
    ahead = (datetime.now(UTC) - there).total_seconds()
    if -OLDEST < ahead < EARLY:
        return ""
    told = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the SuperLink's"
    return (
        f"the SuperLink refuses this node's signatures: the clock here is {told}, and Flower "
        f"allows {OLDEST} s behind to {EARLY} s ahead. Set the clock of this machine"
    )


def too_large(headers: Mapping[str, str]) -> str:
    """Say that a request of this node was refused for its size, and what to do.

    Args:
        headers: Of the request.
    """
    megabytes = int(headers.get("content-length", 0)) / 1e6
    return (
        f"a request of {megabytes:.1f} MB was refused (HTTP 413): a proxy between this node and "
        "the SuperLink accepts none of that size. Tell the operator to raise the limit "
        f"(nginx: client_max_body_size {int(megabytes) + 2}m)"
    )


def retry_handshakes() -> None:
    """Make the SuperNode retry after a handshake broke."""
    from flwr.supercore.retry import make_simple_http_retry_invoker

    put(FLEET, make_simple_http_retry_invoker=patient(make_simple_http_retry_invoker))


# --- deadline: stop waiting for parts of a reply in time


def pull_in_time() -> None:
    """Make Flower's grid wait for the parts of a reply until `UNTIL`, in this process."""
    from flwr.supercore.inflatable.inflatable_utils import pull_objects

    def pull_parts(**named: Any) -> dict[str, bytes]:
        seconds = max(0.0, UNTIL.get() - time.monotonic())
        pauses: dict[str, Any] = {"initial_backoff": LEAST, "backoff_cap": LONGEST}
        return pull_objects(**named, **pauses, max_time=seconds, max_tries_per_object=None)

    put(GRID, pull_objects=pull_parts)


# --- bundle: compress the bundle of an app


def compress_bundles() -> None:
    """Make Flower's command line compress what it writes into the bundle of an app."""
    date = import_module(BUILD).FAB_DATE

    def write_compressed(file: zipfile.ZipFile, name: str, contents: bytes) -> zipfile.ZipFile:
        about = zipfile.ZipInfo(name, date)
        about.compress_type = zipfile.ZIP_DEFLATED
        file.writestr(about, contents)
        return file

    put(BUILD, write_to_zip=write_compressed)


# --- the table

BUILD = "flwr.cli.build"
CLIENT = "flwr.supercore.protobuf.client"
SUPERLINK = "flwr.superlink.cli.flower_superlink"
SUPERNODE = "flwr.supernode.cli.flower_supernode"
NODE_LOOP = "flwr.supernode.start_client_internal"
EXECUTOR_LOOP = "flwr.supercore.superexec.run_superexec"
TASKS = "flwr.supercore.superexec.executor.subprocess_executor"
APP = "flwr.supernode.runtime.run_clientapp"
FLEET = "flwr.supernode.fleet_http_connection"
GRID = "flwr.superlink.grid.http_grid"
PARTS = "flwr.supercore.inflatable.inflatable_utils"
STARTS_EXECUTOR = {f"{NODE_LOOP}:subprocess": "subprocess.Popen(_)"}
STARTS_TASKS = {
    f"{TASKS}:subprocess": "subprocess.DEVNULL; subprocess.Popen(_); "
    "subprocess.Popen(_, stdout, stderr)"
}
SLEEPS = "time.sleep(_)"

AT_SOCKETS = Patch(
    "sockets",
    "Puts the APIs of SuperLink and SuperNode at Unix sockets of this user, and tokens into files. "
    "Without it they listen at ports of 127.0.0.1, which any user of the machine may use.",
    uses={
        f"{CLIENT}:httpx": "httpx.Client(verify, timeout, follow_redirects); httpx.Request; "
        "httpx.Response; httpx.Response(_, headers, content, request, extensions); "
        "httpx.Timeout(connect, read, write, pool)",
        f"{SUPERLINK}:uvicorn": "uvicorn.run(app, host, port, reload, access_log, log_config, "
        "ssl_keyfile, ssl_certfile, workers)",
        f"{SUPERLINK}:subprocess": "subprocess.Popen; subprocess.Popen(_, **_); "
        "subprocess.TimeoutExpired",
        f"{SUPERNODE}:uvicorn": "uvicorn.Config(app, host, port, reload, access_log, "
        "ssl_certfile, ssl_keyfile, workers); uvicorn.Server; uvicorn.Server(_)",
        **STARTS_EXECUTOR,
        **STARTS_TASKS,
    },
    programs={
        LINK: link_at_socket,
        NODE: node_at_socket,
        EXECUTOR: executor_at_socket,
        NODE_EXECUTOR: executor_at_socket,
        ANY: call_sockets,
    },
)
OWNER = Patch(  # applied if its data owner asks for it; without it such a node does not start
    "owner",
    "Shows a run to the owner of the data before it trains, and keeps a history of messages "
    "(`fedraclora.engines.owner`), in the process that the run's code cannot change.",
    uses={
        f"{NODE_LOOP}:_pull_and_store_message": "_pull_and_store_message(state, object_store, "
        "node_config, receive, get_run, get_fab, pull_object, confirm_message_received, "
        "trusted_entities)",
        f"{NODE_LOOP}:_push_messages": "_push_messages(state, object_store, send, push_object)",
        f"{NODE_LOOP}:receive": "receive; receive()",
        f"{NODE_LOOP}:get_run": "get_run; get_run(_)",
        f"{NODE_LOOP}:get_fab": "get_fab; get_fab(_, _)",
        f"{NODE_LOOP}:pull_object": "pull_object; pull_object(_, _)",
        f"{NODE_LOOP}:send": "send; send(_, _, _)",
        f"{NODE_LOOP}:_insert_message": "_insert_message(_, _, _)",
        f"{FLEET}:FleetHttpClient": "FleetHttpClient.from_server_address(_, _, _, interceptors)",
    },
    takes={f"{CLIENT}:ProtobufClient._send": "self, context, *, stream"},
    programs={},
)
PATCHES = (  # `fork` first: it must fork before there are threads
    Patch(
        "fork",
        "Forks the process for a message from one that has imported Flower, where Flower starts a "
        "Python for each. Without it a round takes 1.5 s more, on busy cores 5 to 8.",
        uses={**STARTS_EXECUTOR, **STARTS_TASKS},
        programs={NODE: start_own_executor, NODE_EXECUTOR: fork_tasks},
    ),
    Patch(
        "install",
        "Unpacks and checks an app once, where Flower does it for every message. Without it a "
        "round takes 0.2 s more, on busy cores 2.",
        uses={f"{APP}:install_from_fab": "install_from_fab(_, skip_prompt)"},
        takes={"flwr.cli.install:install_from_fab": "fab_file, install_dir, skip_prompt"},
        programs={CLIENT_APP: install_once},
    ),
    Patch(
        "pauses",
        "Pauses for a tenth of the time since something happened, where a SuperNode pauses for "
        "3 s, and wakes its SuperExec with each message. Without it a round takes 3 s more.",
        uses={
            f"{NODE_LOOP}:time": SLEEPS,
            f"{NODE_LOOP}:_push_messages": "_push_messages(state, object_store, send, push_object)",
            f"{EXECUTOR_LOOP}:time": SLEEPS,
            **STARTS_EXECUTOR,
        },
        programs={NODE: node_pauses, NODE_EXECUTOR: executor_pauses},
    ),
    AT_SOCKETS,
    Patch(
        "resend",
        "Sends the rest of a reply where the SuperLink has a part of it already. Without it a link "
        "that breaks for some seconds costs three minutes, and the client in that round.",
        uses={
            f"{NODE_LOOP}:push_object_contents_from_iterable": "push_object_contents_from_iterable"
            "(_, push_object_fn)"
        },
        takes={
            f"{PARTS}:push_object_contents_from_iterable": "object_contents, push_object_fn, *, "
            "max_concurrent_pushes"
        },
        programs={NODE: resend},
    ),
    Patch(
        "slow_links",
        "Gives each 64 kB of a request the 30 s that Flower gives to the whole. Without it large "
        "messages never arrive below 3 Mbit/s.",
        uses={
            f"{FLEET}:FleetHttpClient": "FleetHttpClient.from_server_address(_, _, _, interceptors)"
        },
        takes={f"{CLIENT}:ProtobufClient._send": "self, context, *, stream"},
        programs={NODE: send_in_parts},
    ),
    Patch(
        "retries",
        "Tries again where a link breaks in a TLS handshake, a certificate has expired or the "
        "SuperLink fails for a moment, and says why it refuses the node. Without it these end the "
        "node.",
        uses={f"{FLEET}:make_simple_http_retry_invoker": "make_simple_http_retry_invoker()"},
        takes={
            "flwr.supercore.retry.retry_invoker:RetryInvoker.__init__": "self, wait_gen_factory, "
            "recoverable_exceptions, max_tries, max_time, *, on_success, on_backoff, on_giveup, "
            "jitter, should_giveup, wait_function",
            "flwr.supercore.error.base:FlowerError.from_json": "value",
        },
        programs={NODE: retry_handshakes},
    ),
    Patch(
        "deadline",
        "Waits for the parts of a reply until `engine.timeout`, and looks for them after 0.1 s. "
        "Without it a node that goes amid its reply holds up the round for three minutes or more.",
        uses={f"{GRID}:pull_objects": "pull_objects(object_ids, pull_object_fn)"},
        takes={
            f"{PARTS}:pull_objects": "object_ids, pull_object_fn, *, max_concurrent_pulls, "
            "max_time, max_tries_per_object, initial_backoff, backoff_cap"
        },
        programs={SERVER: pull_in_time},
    ),
    Patch(
        "bundle",
        "Compresses the bundle of an app, whose files Flower stores as they are. Without it each "
        "node downloads 2.7 MB once, with it 0.9 MB.",
        uses={f"{BUILD}:write_to_zip": "write_to_zip(_, _, _)"},
        takes={f"{BUILD}:write_to_zip": "zipfile_obj, filename, contents"},
        programs={FLWR: compress_bundles},
    ),
)


# --- the program


@contextmanager
def own_api() -> Iterator[None]:
    """Give a node's own API a socket in a private folder inside this context, if it has none."""
    with ExitStack() as stack:
        if not sockets() and why_without(AT_SOCKETS) is None:
            folder = runpy.run_path(str(Path(__file__).parents[1] / "private_folder.py"))
            made = stack.enter_context(folder["PrivateFolder"](longest=LONGEST_PATH))
            os.environ[SOCKETS] = json.dumps({":".join(ADDRESS): f"{made}/api"})
            sys.argv += ["--host", ADDRESS[0], "--port", ADDRESS[1]]
        yield


def main() -> None:
    """Run the Flower program that the command line names."""
    del sys.argv[0]
    program = Path(sys.argv[0]).name
    # Flower's programs start each other by name: make them those of this Python.
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
    if program in {LINK, NODE}:
        for line in lines():
            sys.stderr.write(f"{line}\n")
    with own_api() if program == NODE else ExitStack():
        # ignored by nohup
        if program == NODE and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        patch(program)
        if program == NODE and OWNED in os.environ:  # apps run in other processes
            owner = import_module("fedraclora.engines.owner.watch")
            owner.install(json.loads(os.environ[OWNED]))
        command = EXECUTOR if program == NODE_EXECUTOR else sys.argv[0]
        sys.argv[0] = shutil.which(command) or command
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            if program != NODE or ended.code is not None:
                raise
    if program == NODE:  # Flower's loop has ended without an exit; threads would keep the process
        sys.stderr.write(f"{LINK_LOST}\n")
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
