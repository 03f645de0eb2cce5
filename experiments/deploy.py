"""``fedraclora deploy``: the run of ``simulate`` on real SuperNodes.

``connection=NAME`` starts it at a SuperLink that Flower's configuration names, and follows it;
``local=N`` makes a SuperLink and N SuperNodes on this machine for it. The other words are those of
simulate. The status is that of the run. ``--cfg job`` prints the config, and starts nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.app import conclude, copy_app, is_done, run_config_of
from experiments.choices import composed
from experiments.interrupt import in_order
from experiments.overrides import is_override, key_of, searched
from experiments.progress import RunProgress
from experiments.record import Record
from experiments.simulate import choose, shown
from experiments.status import reported
from experiments.words import key_values
from fedraclora.config.build import build_task
from fedraclora.config.run_config import RunConfig
from fedraclora.config.settings import DeployConfig, PretrainConfig
from fedraclora.engines.deploy.control import COMPLETED, PAUSE, Connection
from fedraclora.engines.deploy.local import LocalDeployment
from fedraclora.engines.programs import command_line
from fedraclora.errors import ConfigError, EngineError
from fedraclora.imports import is_function
from fedraclora.run.folder import alone, method_label
from strategies.server_app import ROW, SUMMARY, read_config, settings_of

OWN = ("connection", "local")  # words of this command alone
KEPT = 40  # lines of a log that are shown where a run fails


@dataclass(frozen=True)
class RunRequest:
    """What is asked for.

    Attributes:
        config: Checked settings, with the server's folder as ``output.dir``.
        plain: The config that the local folder keeps.
        folder: The local run folder.
        resume: Whether to go on with the run in it.
        clients: Size of the population.
    """

    config: RunConfig
    plain: dict[str, object]
    folder: Path
    resume: bool
    clients: int


def prepare(words: Sequence[str], local: int | None) -> RunRequest:
    """Compose and check a run.

    Args:
        words: Those of simulate.
        local: Nodes on this machine, or None.

    Raises:
        FedRacLoraError: Whatever is wrong with what is asked for.
    """
    words = searched(words)
    typed = [key_of(word) for word in words]
    asked = composed(deployed(words, local))
    check_own(asked, typed, local)
    plain, folder, resume = choose(asked, typed, None)
    check_own(plain, [], local)  # of a run to go on with
    folder = folder.resolve()
    # The engine is what this command is for, also where a run goes on that began elsewhere.
    stored = plain["engine"] if isinstance(plain["engine"], dict) else {}
    engine = asked["engine"] if isinstance(asked["engine"], dict) else {}
    if resume and "engine.folder" not in typed:
        engine = {**engine, "folder": stored.get("folder")}
    plain = {**plain, "engine": engine}
    output = plain["output"] if isinstance(plain["output"], dict) else {}
    there = folder if local else engine.get("folder") or f"~/fedraclora/{folder.name}"
    whole = json.dumps({**plain, "output": {**output, "dir": str(there)}})
    config = read_config(whole, began=resume)
    if not isinstance(settings_of(config), DeployConfig):
        raise ConfigError(f"engine is {config.engine.name}: fedraclora deploy has engine=deploy")
    built = build_task(replace(config, pretrain=PretrainConfig()))  # reads the nodes' data, too
    return RunRequest(config, plain, folder, resume, built.clients)


def deployed(words: Sequence[str], local: object) -> list[str]:
    """Add what this command takes where nothing else is typed: engine, and a client for each node.

    Args:
        words: The overrides.
        local: Nodes on this machine, or None.
    """
    typed = [key_of(word) for word in words if is_override(word)]
    sizes = []
    if local is not None and "resume" not in typed and "clients" not in typed:
        sizes = [f"clients={local}", *([] if "cohort" in typed else [f"cohort={local}"])]
    return ["engine=deploy", *sizes, *words]


def run(request: RunRequest, connection: Connection, record: Record | None) -> None:
    """Start a run, follow it to its end, and print the outcome.

    Args:
        request: What is asked for.
        connection: Where.
        record: Keeps what the server tells, where its folder is on another machine.

    Raises:
        EngineError: If it did not come to its end, with what Flower says.
    """
    summary: dict[str, object] = {}
    said: deque[str] = deque(maxlen=KEPT)
    try:
        number = submit(request, connection)
    except Exception:
        if record is not None:
            record.withdraw()
        raise
    label, shown = method_label(request.plain), request.config.output.progress
    with RunProgress(request.config.rounds, shown=shown, label=label) as progress:
        progress.say(f"run {number} at connection {connection.name}")
        try:
            for line in lines_of(connection, number):
                kind, _, text = line.partition(" ")
                if f"{kind} " == ROW:
                    row = json.loads(text)
                    progress.show(row)
                    if record is not None:
                        record.take(row)
                elif f"{kind} " == SUMMARY:
                    summary = json.loads(text)
                else:
                    said.append(line)
        except KeyboardInterrupt:
            progress.say(f"stopping run {number}")
            connection.stop(number)
            raise
    status = connection.status(number)
    if status.word != COMPLETED or not summary:
        print("".join(said), end="", file=sys.stderr)
        raise EngineError(f"run {number} ended as {status.word}: {status.details}")
    if record is not None:
        record.draw()
    conclude(summary, request.folder)


def submit(request: RunRequest, connection: Connection) -> int:
    """Start a run; give Flower's number of it."""
    with tempfile.TemporaryDirectory(prefix="fedraclora-") as made:
        run_config = Path(made) / "run.toml"
        run_config.write_text(run_config_of(request.config, resume=request.resume))
        copy_app(Path(made) / "app")
        return connection.submit(Path(made) / "app", run_config)


def lines_of(connection: Connection, number: int) -> Iterator[str]:
    """Give the lines of a run's log until the run has ended; a stream that breaks begins anew."""
    while True:
        yield from connection.follow(number)
        if connection.status(number).ended:
            return
        time.sleep(PAUSE)


@contextmanager
def place(
    request: RunRequest, local: int | None, name: str
) -> Iterator[tuple[Connection, Record | None]]:
    """Give the connection to run at, and what keeps the record here."""
    if local is None:
        with Record(request.folder, request.plain, resume=request.resume) as record:
            yield Connection(name, command_line(os.environ)), record
        return
    if request.resume:
        with alone(
            request.folder
        ):  # the server will hold it: better to know before all of it starts
            pass
    served = [list(range(k, request.clients, local)) for k in range(local)]
    with LocalDeployment(
        [ids for ids in served if ids], data=own_data(request.plain)
    ) as deployment:
        yield deployment.connection, None


def own_data(plain: Mapping[str, object]) -> str | None:
    """Give what nodes of this machine are told of their data: None where the run brings them."""
    data = plain["data"]
    if not isinstance(data, Mapping) or data["name"] != "own":
        return None
    samples = str(data["samples"])
    return samples if is_function(samples) else str(Path(samples).expanduser().resolve())


def check_own(plain: Mapping[str, object], typed: Sequence[str], local: int | None) -> None:
    """Check that it is said where the clients' own samples are, and once.

    Raises:
        ConfigError: If nodes of this machine are told nothing, or others twice.
    """
    data = plain["data"]
    if not isinstance(data, Mapping) or data.get("name") != "own":
        return
    if local and data.get("samples") is None:
        raise ConfigError(
            "data=own with local=: say what the nodes on this machine train on, by data.samples, a "
            "folder or module:function that has the samples of every client"
        )
    if not local and "data.samples" in typed:
        raise ConfigError(
            f"data.samples={data['samples']} is for simulate and local=: at a connection each node "
            "says where its samples are, by data in its node-config; leave it out"
        )


def parted(words: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """Part the words of this command, by key, from the others."""
    own = [word for word in words if word.partition("=")[0] in OWN]
    return key_values(own), [word for word in words if word not in own]


def split(words: Sequence[str]) -> tuple[str, int | None, list[str]]:
    """Part the words of this command from those of simulate.

    Raises:
        ConfigError: If it is not one of ``connection=NAME`` and ``local=N``.
    """
    own, rest = parted(words)
    local, name = own.get("local"), str(own.get("connection", ""))
    if (local is None) == (not name):
        raise ConfigError(
            "say where: connection=NAME for a SuperLink that Flower's config.toml names, or "
            "local=3 for one on this machine with 3 SuperNodes"
        )
    if local is not None and (not isinstance(local, int) or isinstance(local, bool) or local < 1):
        raise ConfigError(f"local is {local!r}; a number of SuperNodes is wanted")
    return name, local if isinstance(local, int) else None, rest


@reported
@in_order()
def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; the status is that of the run."""
    words = sys.argv[1:] if words is None else list(words)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    own, rest = parted(words)
    if shown(deployed(rest, own.get("local"))):
        return 0
    name, local, rest = split(words)
    request = prepare(rest, local)
    if not is_done(request.folder, request.plain, resume=request.resume):
        with place(request, local, name) as (connection, record):
            run(request, connection, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
