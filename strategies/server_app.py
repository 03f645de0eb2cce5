"""The ServerApp of ``flwr run``: the same run, in the process that Flower starts for it.

The run's config comes as JSON in the run config, ``cfg-json``; ``fedraclora flower`` writes it.
What simulate leaves in its run folder is left in ``output.dir``.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid as FlowerGrid
from flwr.serverapp import ServerApp
from typing_extensions import override

from fedraclora.config.run_config import RunConfig, from_plain
from fedraclora.config.settings import DeployConfig, FlowerConfig
from fedraclora.engines.base import Engine, EngineParts, Grid
from fedraclora.engines.deploy.grid import DeployGrid
from fedraclora.engines.deploy.pulling import pull_in_time
from fedraclora.engines.flower.nodes import NodePerClient
from fedraclora.errors import ConfigError
from fedraclora.run.callback import Begin, Callback
from fedraclora.run.folder import run_id
from fedraclora.run.ledger import Row, headline, number
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.outcome import execute
from fedraclora.weights.replica import JobFolder
from fedraclora.weights.update import WeightHistory

log = logging.getLogger("flwr")  # the log that Flower streams to its user

# How lines of the log begin that a program reads.
ROW, SUMMARY, OPENING = "fedraclora-row ", "fedraclora-summary ", "fedraclora-opening "

app = ServerApp()


@app.main()
def main(grid: FlowerGrid, context: Context) -> None:
    """Run the federated experiment of ``cfg-json``.

    Raises:
        ConfigError: If it is missing, or of another engine.
    """
    resume = bool(context.run_config.get("resume", False))
    config = config_from_text(str(context.run_config.get("cfg-json", "")), began=resume)

    folder, ended = Path(str(config.output.dir)).expanduser(), watch()
    deployed = config.engine.name == DeployConfig.name

    def engine_of(config: RunConfig) -> Engine:
        settings = settings_of(config)
        if isinstance(settings, DeployConfig):
            known = not config.pretrain.epochs
            shared = config.output.shared
            return on_hosts(grid, settings, folder, known=known, shared=shared, ended=ended)
        return in_server_app(grid, settings, config, ended=ended)

    told = [LogLines(deployed)]
    run = execute(config, folder, engine_of, resume=resume, callbacks=told)
    if deployed:
        write_line(SUMMARY, run.summary)


def on_hosts(
    flower: FlowerGrid,
    settings: DeployConfig,
    folder: Path,
    *,
    known: bool,
    shared: bool,
    ended: Callable[[], bool],
) -> Engine:
    """Make the engine of real SuperNodes; each message brings what its client's weights lack.

    Args:
        flower: Flower's own grid.
        settings: How long to wait, and how many clients are enough.
        folder: Of the run, whose name clients know it by.
        known: Whether clients can make the initial weights themselves.
        shared: Whether others may use the folder.
        ended: Tells whether the runtime has ended.
    """
    history = WeightHistory()

    def make_grid(_: EngineParts) -> Grid:
        pull_in_time()
        name = run_id(folder, shared=shared)
        return DeployGrid(flower, history, name, settings, known=known, ended=ended)

    return Engine(history, make_grid, history.recall, elsewhere=True)


def in_server_app(
    flower: FlowerGrid, settings: FlowerConfig, config: RunConfig, *, ended: Callable[[], bool]
) -> Engine:
    """Make the engine of Flower's simulation, started by ``flwr run`` with this process in it.

    Args:
        flower: Flower's own grid.
        settings: How long to wait.
        config: Of the run; the processes read it from a folder.
        ended: Tells whether the runtime has ended.
    """
    job, timeout = JobFolder(config.plain), settings.timeout

    def make_grid(parts: EngineParts) -> Grid:
        clients, store = parts.built.clients, parts.store
        return NodePerClient(flower, clients, job, store=store, timeout=timeout, ended=ended)

    return Engine(job, make_grid)


def config_from_text(text: str, *, began: bool = False) -> RunConfig:
    """Read the config of a run, which goes on if it ``began`` before.

    Raises:
        ConfigError: If it is missing, not JSON, of another engine or without ``output.dir``.
    """
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"cfg-json is no JSON ({error})") from error
    if not plain or not isinstance(plain, dict):
        raise ConfigError(
            "cfg-json, the config of the run, is empty: write it with `fedraclora flower --write "
            "run.toml ...` and pass it with `flwr run . -c run.toml`, or do both by "
            "`fedraclora flower ...`"
        )
    config = from_plain(plain, METHODS, began=began)
    settings_of(config)
    if config.output.dir is None or not Path(config.output.dir).expanduser().is_absolute():
        raise ConfigError(
            f"output.dir is {config.output.dir}, but Flower's processes run in folders of their "
            "own: write an absolute path"
        )
    return config


def watch() -> Callable[[], bool]:
    """Build the function that tells whether the runtime around this thread has ended.

    It is the main thread, which ends when its backend fails, while a ServerApp would wait on for
    replies. And it must end with the process that started it: Flower watches for that, but its
    signal is raised in another thread, and not heard while the main thread waits for this one.
    """
    parent = os.getppid()
    return lambda: not threading.main_thread().is_alive() or os.getppid() != parent


def settings_of(config: RunConfig) -> FlowerConfig | DeployConfig:
    """Return the settings of the engine.

    Raises:
        ConfigError: If it is another one.
    """
    if not isinstance(config.engine, FlowerConfig | DeployConfig):
        raise ConfigError(
            f"engine is {config.engine.name}, but Flower started this process: use engine=flower "
            "or deploy"
        )
    return config.engine


@dataclass
class LogLines(Callback):
    """Tells in the log how a run begins and goes.

    Attributes:
        deployed: Whether `fedraclora deploy` reads it there: then a line holds a whole row.
    """

    deployed: bool

    @override
    def begin(self, run: Begin) -> None:
        if self.deployed:
            write_line(OPENING, {"lines": [*run.lines, *(f"note: {note}" for note in run.notes)]})
            return
        for line in run.lines:
            log.info("%s", line)
        for note in run.notes:
            log.warning("%s", note)

    @override
    def row(self, row: Row) -> None:
        if self.deployed:
            write_line(ROW, row)
            return
        name = headline([row])
        figure = "" if name is None else f": {name} {number(row, 'metrics', name):.4f}"
        log.info("round %s%s", row["round"], figure)


def write_line(mark: str, value: Mapping[str, object]) -> None:
    """Write JSON as one line of what Flower streams to its user."""
    print(mark + json.dumps(value, default=str), flush=True)  # noqa: T201
