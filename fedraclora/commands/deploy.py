"""``fedraclora deploy``: run what ``simulate`` runs on real SuperNodes.

``connection=NAME`` submits the run to a SuperLink from Flower's configuration and follows it;
``nodes=N`` starts a SuperLink and N SuperNodes on this machine. The other arguments are those of
simulate. The exit status is that of the run. A run waits until the runs before it at its connection
have ended; ``deploy.queue=false`` starts it at once. ``nodes=N deploy.patched=false`` runs Flower
without our patches, slower (docs/deploy.md).
``--cfg job`` prints the config and starts nothing. ``--check`` reports problems before a run;
``--check=FILE`` also writes the file for data owners, for ``fedraclora node --check=FILE``.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fedraclora.binding import PlainDict, section, without
from fedraclora.commands.app import ServerRun, request_of_files, write_app
from fedraclora.commands.simulate import print_outcome, shows_composed
from fedraclora.commands.watch import watched
from fedraclora.compose.overrides import composed, is_override, key_of, searched
from fedraclora.compose.resume import explaining_resume, is_done
from fedraclora.compose.words import check_word, part
from fedraclora.config.resuming import PATHS
from fedraclora.config.settings import DeployConfig
from fedraclora.config.titles import run_title
from fedraclora.engines import flower_patches
from fedraclora.engines.deploy.control import PAUSE, PENDING, Connection
from fedraclora.engines.deploy.federation import FederationFiles
from fedraclora.engines.deploy.local import LocalDeployment
from fedraclora.engines.flower_patches import ALL, UNPATCHED
from fedraclora.engines.programs import command_line
from fedraclora.errors import CheckpointError, ConfigError, EngineError
from fedraclora.launch import choose
from fedraclora.limits import Count
from fedraclora.private_folder import PrivateFolder
from fedraclora.run.events import KIND, NOTICE, ROUND, ROW, STOPPED, SUMMARY, TEXT, TIME, Event
from fedraclora.run.folder import amend, begin_folder, locked_folder, refuse_existing, write_summary
from fedraclora.run.ledger import Ledger, reached_round
from fedraclora.run.log import LOG, logged
from fedraclora.run.log import NOTICE as NOTICE_LEVEL
from fedraclora.run.recorder import checkpoint_meta
from fedraclora.run.stopped import forget_stop, note_stop, stop_kind
from fedraclora.schema import bound
from fedraclora.terminal.progress import RunProgress
from fedraclora.trust import is_function

PATCHED, QUEUE = "deploy.patched", "deploy.queue"
OWN_KEYS = ("connection", "nodes", PATCHED, QUEUE)
NOT_STARTED = 60.0  # seconds after which a run should have been started
TURN = 5.0  # seconds between looks whether other runs have ended
SAVED = 35.0  # seconds in which a server notices that it is stopped, and saves the run
KEPT = 40  # lines of the server's log that are kept if a run fails

log = logging.getLogger(__name__)


def prepare(words: Sequence[str], nodes: int | None) -> ServerRun:
    """Compose and check a run.

    Args:
        words: Overrides, as for simulate.
        nodes: Number of nodes on this machine, or None.

    Raises:
        FedRacLoraError: If the config is invalid, or cannot run on the nodes.
    """
    words = searched(words)
    keys = [key_of(word) for word in words]
    config = composed(deployed(words, nodes))
    check_preset(words, keys, nodes)
    check_own(config, keys, nodes)
    plain, folder, resume = choose(config, keys, None)
    check_own(plain, [], nodes)  # the config of a resumed run
    if not resume:
        refuse_existing(folder)
    folder, engine = folder.resolve(), section(config, "engine")
    configured = section(plain, "engine").get("folder") or engine.get("folder")
    server_folder = folder if nodes else configured or f"~/fedraclora/{folder.name}"
    if section(plain, "engine").get("name") != DeployConfig.name:
        plain = {**plain, "engine": engine}  # the run began on another engine
    return ServerRun(plain, folder, there=server_folder, resume=resume)


def deployed(words: Sequence[str], nodes: object) -> list[str]:
    """Add ``engine=deploy`` and, without other sizes, one client for each node of this machine.

    Args:
        words: The overrides.
        nodes: Number of nodes on this machine, or None.
    """
    typed = [key_of(word) for word in words if is_override(word)]
    sizes = []
    if nodes is not None and not {"resume", "clients"} & {*typed}:
        sizes = [f"{key}={nodes}" for key in ("clients", "clients_per_round") if key not in typed]
    return ["engine=deploy", *sizes, *words]


class Record:
    """Records a remote run in a local folder; as a context manager it locks the folder.

    Weights, chain and checkpoints stay on the server.

    Args:
        folder: The folder.
        plain: The config.
        resume: Whether the folder already has the run.

    Raises:
        CheckpointError: If another process has locked the folder.
    """

    def __init__(self, folder: Path, plain: PlainDict, *, resume: bool) -> None:
        self.folder, self.plain, self.resume = folder, plain, resume
        self._stack = ExitStack()
        self._new: list[Path] = []

    def __enter__(self) -> Record:
        """Lock the folder, and write the config."""
        inside = [
            self.folder / name for name in (".lock", "config.yaml", "digests.json", "ledger.jsonl")
        ]
        outside = [self.folder, *self.folder.parents]
        self._new = [path for path in (*inside, *outside) if not path.exists()]
        with ExitStack() as stack:
            shared = bool(section(self.plain, "output").get("shared"))
            stack.enter_context(locked_folder(self.folder, shared=shared))
            if self.resume:
                amend(self.folder, self.plain)
            else:
                begin_folder(self.folder, self.plain)
            self.ledger = Ledger(self.folder / "ledger.jsonl")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Unlock the folder; draw the curves if the run did not finish."""
        with self._stack, suppress(OSError):  # a failed drawing must not hide the error
            if kind is not None and self.ledger.rows:
                self.draw()

    def withdraw(self) -> None:
        """Remove the files that this run created, after the server rejected it."""
        for path in self._new:
            with suppress(OSError):  # a folder that has other files by now
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)

    def take(self, row: PlainDict) -> None:
        """Append a row to the ledger, once.

        A server that resumed from a checkpoint repeats rounds: they replace the earlier rows.
        """
        if self.ledger.has(row):
            return
        self.ledger.cut(int(str(row["round"])) - 1)
        self.ledger.append(row, sync=False)

    def draw(self) -> None:
        """Draw the curves if ``output.plots`` is set."""
        if section(self.plain, "output").get("plots"):
            from fedraclora.plots.run import run_curves

            picture = self.folder / "curves.png"
            rounds = int(str(self.plain["rounds"]))
            run_curves(self.ledger.rows, picture, run_title(self.plain), planned=rounds)


def follow(run: ServerRun, connection: Connection, record: Record | None) -> None:
    """Submit a run, follow it to its end, and print the outcome.

    Args:
        run: The run.
        connection: The SuperLink.
        record: Records the rows here if the server writes on another machine.

    Raises:
        EngineError: If the run did not finish; it quotes Flower's reason.
    """
    number = submit(run, connection, record)
    config, output = run.config, run.config.output
    shown = {"shown": output.progress, "verbose": output.verbose}
    with RunProgress(config.rounds, label=config.label, **shown) as progress:
        heard = RunListener(run, record, progress)
        with heard, noting_stop(heard), audited(connection, number):
            progress.say(f"run {number} at connection {connection.name}")
            try:
                with told_if_pending(connection, number, progress.notice):
                    for line in lines_of(connection, number):
                        heard.line(line)
            except KeyboardInterrupt:
                progress.stopping(f"run {number}")
                connection.stop(number)
                run.checkpoint = saved_round(run.config.output.dir)
                raise
            status = connection.status(number)
            if not status.completed or not heard.summary:
                where = heard.keep_tail()
                raise EngineError(f"run {number} ended as {status.word}: {status.details}{where}")
    if record is not None:
        record.draw()
    write_summary(run.folder, heard.summary)  # with this checkout's revision: the app has none
    print_outcome(heard.summary, run.folder, run.plain)


class RunListener:
    """Takes in the output of a server, line by line; as a context manager it opens the run's log.

    Args:
        run: The run.
        record: Records the rows here if the server writes on another machine.
        progress: Shows them.

    Attributes:
        summary: The final figures; empty until the run has finished.
        stopped: How the run ended early, by its server: ``diverged``, for example; else None.
    """

    def __init__(self, run: ServerRun, record: Record | None, progress: RunProgress) -> None:
        self.run, self.record, self.progress = run, record, progress
        self.summary: dict[str, object] = {}
        self.stopped: str | None = None
        self._tail: deque[str] = deque(maxlen=KEPT)
        self._begun, self._stack = False, ExitStack()
        self._logs = False
        self._noticed: set[tuple[str, object]] = set()

    def __enter__(self) -> RunListener:
        """Open the log, if there is a folder by now."""
        if self.record is not None:
            self._open_log()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the log."""
        self._stack.close()

    def _open_log(self) -> None:
        if not self._logs and self.run.folder.is_dir():
            self._stack.enter_context(logged(self.run.folder))
            self._logs = True

    def line(self, line: str) -> None:
        """Take in a line."""
        if (event := Event.read(line)) is None:
            self._tail.append(line)
        elif event.kind == ROW:
            self.progress.row(event.value)
            if self.record is not None:
                self.record.take(event.value)
        elif event.kind == SUMMARY:
            self.summary = event.value
        elif event.kind == STOPPED:
            self.run.checkpoint = kept_round(event.value)
            self.stopped = str(kind) if (kind := event.value.get(KIND)) else None
        elif event.kind == NOTICE:
            self._notice(str(event.value.get(TEXT)), event.value.get(TIME))
        elif not self._begun:  # a broken log stream starts again from its first line
            self._begun = True
            self._open_log()
            self.progress.open(event.value, self.run.plain, self.run.folder)

    def _notice(self, text: str, time_: object) -> None:
        """Show a warning of the server once: a broken stream repeats it."""
        if (text, time_) in self._noticed:
            return
        self._noticed.add((text, time_))
        self.progress.notice(text)
        if self.record is not None:  # else the server logs it there
            log.log(NOTICE_LEVEL, "%s", text)

    def keep_tail(self) -> str:
        """Keep the last lines of a run that failed; return where, for an error."""
        self._open_log()
        tail = "".join(self._tail)
        if not self._logs:
            print(tail, end="", file=sys.stderr)
            return ""
        log.info("the last lines of the server's log:\n%s", tail)
        return f" (the last lines of the server's log are in {self.run.folder / LOG})"


def saved_round(there: object) -> int | None:
    """Wait until the server has saved a run that is stopped; return the round of its checkpoint.

    Args:
        there: The server's folder.

    Returns:
        None if the folder is on another host, or is another user's.
    """
    folder, end = Path(str(there)).expanduser(), time.monotonic() + SAVED
    with suppress(OSError, CheckpointError):
        while folder.is_dir() and stop_kind(folder) is None and time.monotonic() < end:
            time.sleep(PAUSE)
        return kept_round(checkpoint_meta(folder))
    return None


def kept_round(value: Mapping[str, object]) -> int | None:
    """Read the round of the checkpoint of a run that has failed; None if it has none."""
    round_ = value.get(ROUND)
    return round_ if isinstance(round_, int) else None


def submit(run: ServerRun, connection: Connection, record: Record | None = None) -> int:
    """Submit a run; return Flower's id of it. If that fails, remove its record."""
    try:
        with PrivateFolder() as made:
            folder, file = write_app(run, Path(made))
            number = connection.submit(folder, file)
            request = request_of_files(folder, file)
        about = {"digest": request.digest, "code": request.code, "folder": str(run.folder)}
        audit(connection, "start", run=number, **about)
        return number
    except Exception:
        if record is not None:
            record.withdraw()
        raise


@contextmanager
def noting_stop(heard: RunListener) -> Iterator[None]:
    """Write into the local record how a run inside ends early; the server writes its own."""
    record = heard.record
    if record is None:
        yield
        return
    forget_stop(record.folder)
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # must not hide how it ended
            if record.ledger.rows:
                note_stop(record.folder, reached_round(record.folder), error, heard.stopped)
        raise


@contextmanager
def audited(connection: Connection, number: int) -> Iterator[None]:
    """Write into the operator's audit log how a run ends inside."""
    status = "completed"
    try:
        yield
    except BaseException as error:
        status = str(error) or "interrupted"
        raise
    finally:
        audit(connection, "end", run=number, status=status)


def audit(connection: Connection, what: str, **facts: object) -> None:
    """Write an entry into the operator's audit log, if there is one."""
    try:
        if (files := FederationFiles.of(connection.environ)) is not None:
            files.audit(what, **facts)
    except (EngineError, OSError) as error:
        log.warning("the audit log is not written: %s", error)


def await_turn(connection: Connection) -> None:
    """Wait until no other run is at a connection: nodes would serve both by turns, slowly."""
    told = list[int]()
    while running := connection.running():
        if running != told:
            told, several = running, "s" * (len(running) > 1)
            numbers = ", ".join(map(str, running))
            print(
                f"waiting for run{several} {numbers} at connection {connection.name} to end "
                f"({QUEUE}=false does not wait)",
                file=sys.stderr,
            )
        time.sleep(TURN)


def lines_of(connection: Connection, number: int) -> Iterator[str]:
    """Yield the log of a run, line by line, until the run ends; a broken stream starts again."""
    while True:
        yield from connection.follow(number)
        if connection.status(number).ended:
            return
        time.sleep(PAUSE)


@contextmanager
def told_if_pending(
    connection: Connection, number: int, tell: Callable[[str], None]
) -> Iterator[None]:
    """Tell once, inside, that a SuperLink has not started a run for long: its log stays empty."""

    def look() -> None:
        with suppress(EngineError):
            if connection.status(number).word == PENDING:
                tell(
                    f"run {number} has not been started for {NOT_STARTED:g} s. If no other run is "
                    "there, the SuperLink's process that starts runs has ended: restart the "
                    "SuperLink, then resume"
                )

    timer = threading.Timer(NOT_STARTED, look)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def place(
    run: ServerRun, nodes: int | None, name: str, *, patched: bool = True
) -> Iterator[tuple[Connection, Record | None]]:
    """Open the connection of a run, and its local record (None if the server writes here)."""
    if nodes is None:
        connection = Connection(name, command_line(os.environ))
        for line in connection.certificate_warnings():
            print(line, file=sys.stderr)
        with Record(run.folder, run.plain, resume=run.resume) as record:
            yield connection, record
        return
    if run.resume:
        with locked_folder(run.folder):
            pass  # the server needs the lock: fail before starting everything
    ends = [run.built.clients * k // nodes for k in range(nodes + 1)]  # consecutive client ids
    served = [list(range(*span)) for span in pairwise(ends)]
    data = own_data(run.config.data.group)
    local = LocalDeployment([ids for ids in served if ids], data=data, patched=patched)
    for line in flower_patches.lines(local.environ):
        print(line, file=sys.stderr)
    with local as deployment:
        yield deployment.connection, None


def own_data(data: Mapping[str, object]) -> str | None:
    """Return the ``data`` of the node-config of local nodes; None if the app brings the data."""
    if data["name"] != "own":
        return None
    samples = str(data["samples"])
    return samples if is_function(samples) else str(Path(samples).expanduser().resolve())


def check_preset(words: Sequence[str], keys: Sequence[str], nodes: int | None) -> None:
    """Check that a preset has as many clients as there are nodes on this machine.

    Raises:
        ConfigError: If it has another number: the run would silently differ from the preset.
    """
    if nodes and "experiment" in keys and not {"clients", "resume"} & {*keys}:
        clients = composed(["engine=deploy", *words])["clients"]
        if isinstance(clients, int) and clients != nodes:
            raise ConfigError(
                f"nodes={nodes} gives each node a client, but the preset has clients={clients}: "
                f"add clients={nodes}, or clients={clients} for nodes of several"
            )


def check_own(plain: Mapping[str, object], keys: Sequence[str], nodes: int | None) -> None:
    """Check that exactly one setting locates the samples of each node.

    Raises:
        ConfigError: If nodes on this machine have no ``data.samples``, if remote nodes have it
            besides their own setting, or if remote hosts cannot resolve a path (`check_files`).
    """
    if not nodes:
        check_files(plain)
    data = section(plain, "data")
    if data.get("name") != "own":
        return
    if nodes and data.get("samples") is None:
        raise ConfigError(
            "data=own with nodes=: the nodes on this machine have no data. Set data.samples to "
            "a folder or module:function with the samples of every client."
        )
    if not nodes and "data.samples" in keys:
        raise ConfigError(
            f"data.samples={data['samples']} is for simulate and nodes=. Leave it out: at a "
            "connection each node sets data in its node-config."
        )


def check_files(plain: Mapping[str, object]) -> None:
    """Check that the paths of a remote run are absolute.

    Raises:
        ConfigError: If a path is relative: the server starts in another folder.
    """
    data, model = section(plain, "data"), section(plain, "model")
    # Nodes set the path of their own samples.
    named = {f"data.{key}": data.get(key) for key in PATHS if key != "samples"}
    named["model.path"] = model.get("path")
    root = str(data.get("root") or "")
    for key, value in named.items():
        text = value if isinstance(value, str) and ":" not in value else ""
        under = key != "model.path" and Path(root).is_absolute() and (Path(root) / text).exists()
        if text and not (under or Path(text).expanduser().is_absolute()):
            raise ConfigError(
                f"{key}={text} is relative to this folder, but the server and the nodes read it "
                "on their own hosts. Give an absolute path that is the same on all of them."
            )


def own_settings(own: Mapping[str, object]) -> tuple[str, int | None, LaunchOptions]:
    """Check `OWN_KEYS`: return the connection, the number of nodes here, and how to start."""
    flags = {key.partition(".")[2]: own[key] for key in (PATCHED, QUEUE) if key in own}
    nodes = bound("", connection_or_nodes, without(own, PATCHED, QUEUE))()
    options = bound("deploy", LaunchOptions, flags)()
    options.check(nodes)
    return str(own.get("connection", "")), nodes, options


def connection_or_nodes(*, connection: object = "", nodes: Count | None = None) -> int | None:
    """Return the number of nodes on this machine; None at a connection.

    Raises:
        ConfigError: If not exactly one of them is given.
    """
    if (nodes is None) == (not connection):
        raise ConfigError(
            "give connection=NAME for a SuperLink in Flower's config.toml, or nodes=3 to start "
            "one on this machine with 3 SuperNodes"
        )
    return nodes


@dataclass(frozen=True)
class LaunchOptions:
    """How a deployment starts.

    Attributes:
        patched: Whether to patch the Flower programs that this command starts.
        queue: Whether to wait until other runs of the connection have ended.
    """

    patched: bool = True
    queue: bool = True

    def check(self, nodes: int | None) -> None:
        """Check that the options fit where the run goes.

        Raises:
            ConfigError: If programs are not to be patched, but run elsewhere; or if runs are not to
                wait where there is no other run.
        """
        if not self.patched and nodes is None:
            raise ConfigError(
                f"{PATCHED}=false works with nodes=N, which starts Flower's programs here. At a "
                f"connection, set {UNPATCHED}={ALL} in the environment of the SuperLink and of "
                "`fedraclora node`"
            )
        if not self.queue and nodes is not None:
            raise ConfigError(
                f"{QUEUE}=false works with connection=NAME: the SuperLink that nodes={nodes} "
                "starts has no other run. Leave it out"
            )


def main(words: Sequence[str]) -> int:
    """Deploy a run as the command line says; return its exit status."""
    words, file = check_word(words)
    own, rest = part(words, OWN_KEYS)
    if shows_composed(deployed(rest, own.get("nodes"))):
        return 0
    name, nodes, options = own_settings(own)
    run = prepare(rest, nodes)
    if file is not None:
        from fedraclora.commands.check import check_run

        connection = None if nodes else Connection(name, command_line(os.environ))
        return check_run(run, connection, file or None)
    if run.resume and is_done(run.folder, run.plain):
        print(f"{run.folder} is finished already")
        return 0
    again = f"deploy nodes={nodes}" if nodes else f"deploy connection={name}"
    again += "" if options.patched else f" {PATCHED}=false"
    if nodes is None and options.queue:
        await_turn(Connection(name, command_line(os.environ)))
    with (
        watched(run.folder),
        explaining_resume(run.folder, again, there=None if nodes else lambda: run.checkpoint),
        place(run, nodes, name, patched=options.patched) as (connection, record),
    ):
        follow(run, connection, record)
    return 0
