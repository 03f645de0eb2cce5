"""The ServerApp of ``fedraclora deploy``, which executes a run in a process of Flower.

The run's config comes as JSON in the run config, ``cfg-json``; ``fedraclora deploy`` writes it.
What simulate leaves in its run folder is left in ``output.dir``.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid as FlowerGrid
from flwr.serverapp import ServerApp

from fedraclora.config.run_config import RunConfig, from_plain
from fedraclora.config.settings import DeployConfig
from fedraclora.engines import flower_patches
from fedraclora.engines.base import Engine, Grid
from fedraclora.engines.deploy.grid import DeployGrid
from fedraclora.errors import ConfigError
from fedraclora.run.events import EventRecord
from fedraclora.run.folder import run_id
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.runner import execute
from fedraclora.weights.update import WeightHistory

app = ServerApp()


@app.main()
def main(grid: FlowerGrid, context: Context) -> None:
    """Run the federated experiment of ``cfg-json``.

    Raises:
        ConfigError: If it is missing, or its engine is not ``deploy``.
    """
    resume = bool(context.run_config.get("resume", False))
    config = config_from_text(str(context.run_config.get("cfg-json", "")), resuming=resume)

    folder, ended = Path(str(config.output.dir)).expanduser(), watch()
    known, shared = not config.pretrain.epochs, config.output.shared
    settings = settings_of(config)
    engine = on_hosts(grid, settings, folder, known=known, shared=shared, ended=ended)
    run = RunBuilder(config, folder, resume=resume, engine=engine, callbacks=[EventRecord()])
    execute(run)


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

    def make_grid(*_: object) -> Grid:
        flower_patches.patch(flower_patches.SERVER)
        name = run_id(folder, shared=shared)
        return DeployGrid(flower, history, name, settings, known=known, ended=ended)

    return Engine(history, make_grid, history.recall, elsewhere=True)


def config_from_text(text: str, *, resuming: bool = False) -> RunConfig:
    """Read the config of a run, new or ``resuming``.

    Raises:
        ConfigError: If it is missing, not JSON, of another engine or without ``output.dir``.
    """
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"cfg-json is not JSON ({error}). Start the run by `fedraclora deploy`, which writes it"
        ) from error
    if not plain or not isinstance(plain, dict):
        raise ConfigError(
            "cfg-json, the config of the run, is empty. Start the run by `fedraclora "
            "deploy`, which writes it"
        )
    config = from_plain(plain, METHODS, resuming=resuming)
    settings_of(config)
    if config.output.dir is None or not Path(config.output.dir).expanduser().is_absolute():
        raise ConfigError(
            f"output.dir={config.output.dir}: Flower's processes run in other folders. Give "
            "an absolute path"
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


def settings_of(config: RunConfig) -> DeployConfig:
    """Return the settings of the engine.

    Raises:
        ConfigError: If it is another one.
    """
    if not isinstance(config.engine, DeployConfig):
        raise ConfigError(
            f"engine={config.engine.name}: `fedraclora deploy` runs only with engine=deploy. "
            "Leave engine out"
        )
    return config.engine
