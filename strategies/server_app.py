"""Define the ServerApp of ``fedraclora deploy``, which executes a run in a process of Flower.

The run's config is JSON in Flower's run config, ``cfg-json``, which ``fedraclora deploy`` writes.
The run folder is ``output.dir``, with the same files as in a simulation.
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
from fedraclora.engines.deploy.federation import FederationFiles
from fedraclora.engines.deploy.grid import DeployGrid
from fedraclora.engines.deploy.stopping import StopSignals
from fedraclora.engines.owner.request import FOLLOWED, RESUME
from fedraclora.errors import ConfigError
from fedraclora.run.events import EventRecord, noticed
from fedraclora.run.folder import run_id
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.runner import execute
from fedraclora.weights.update import WeightHistory

BUNDLE = "bundle"  # key of the run config: bytes of the app's bundle

app = ServerApp()


@app.main()
def main(grid: FlowerGrid, context: Context) -> None:
    """Run the federated experiment of ``cfg-json``.

    Raises:
        ConfigError: If it is missing, or its engine is not ``deploy``.
    """
    resume = bool(context.run_config.get(RESUME, False))
    config = config_from_text(str(context.run_config.get("cfg-json", "")), resuming=resume)

    folder, ended = Path(str(config.output.dir)).expanduser(), watch()
    known, shared = not config.pretrain.epochs, config.output.shared
    settings, bundle = settings_of(config), int(context.run_config.get(BUNDLE, 0))
    stops = StopSignals()

    def engine(name: str = "") -> Engine:
        return on_hosts(
            grid,
            settings,
            folder,
            name,
            known=known,
            shared=shared,
            ended=ended,
            bundle=bundle,
            stops=stops,
        )

    told = [EventRecord(int(context.run_config.get(FOLLOWED, 0)))]
    with noticed(), stops.handled():
        execute(
            RunBuilder(
                config, folder, resume=resume, engine=engine(), callbacks=told, probing=engine
            )
        )


def on_hosts(
    flower: FlowerGrid,
    settings: DeployConfig,
    folder: Path,
    probe: str = "",
    *,
    known: bool,
    shared: bool,
    ended: Callable[[], bool],
    bundle: int = 0,
    stops: StopSignals | None = None,
) -> Engine:
    """Create the engine of real SuperNodes; each message brings the updates that its clients need.

    Args:
        flower: Flower's own grid.
        settings: How long to wait, and how many clients are enough.
        folder: The run folder, whose name identifies the run for clients.
        probe: What is added to that name for probe rounds.
        known: Whether clients can build the initial weights themselves.
        shared: Whether other users may access the folder.
        ended: Tells whether the runtime has ended.
        bundle: Bytes of the app's bundle, which each node downloads.
        stops: Ends an exchange when the run is stopped.
    """
    history = WeightHistory()

    def make_grid(*_: object) -> Grid:
        flower_patches.patch(flower_patches.SERVER)
        name = run_id(folder, shared=shared) + probe
        return DeployGrid(
            flower,
            history,
            name,
            settings,
            known=known,
            ended=ended,
            federation=FederationFiles.of(os.environ),
            bundle=bundle,
            stops=stops,
            search=str(int(probe) + 1) if probe else "",
        )

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

    The main thread ends if its backend fails, while a ServerApp would wait for replies for ever.
    The ServerApp must also end with the process that started it: Flower checks that, but raises its
    signal in another thread, which has no effect while the main thread waits for this one.
    """
    parent = os.getppid()
    return lambda: not threading.main_thread().is_alive() or os.getppid() != parent


def settings_of(config: RunConfig) -> DeployConfig:
    """Return the settings of the engine.

    Raises:
        ConfigError: If it is another engine.
    """
    if not isinstance(config.engine, DeployConfig):
        raise ConfigError(
            f"engine={config.engine.name}: `fedraclora deploy` runs only with engine=deploy. "
            "Leave engine out"
        )
    return config.engine
