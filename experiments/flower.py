"""``fedraclora flower``: the run of ``simulate``, as a Flower app by ``flwr run`` on this machine.

The words are those of simulate. The config is checked here and goes to the app as JSON; a
SuperLink of this command's own runs the app in Flower's simulation runtime, one node per client,
and what a run leaves behind lands in the run folder. The status is that of the run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.app import checkout, conclude, copy_app, is_done, run_config_of
from experiments.choices import composed
from experiments.interrupt import in_order
from experiments.overrides import key_of, searched
from experiments.simulate import choose, shown
from experiments.status import reported
from fedraclora.build import build_task
from fedraclora.config import RunConfig
from fedraclora.engines.flower.grid import run_options
from fedraclora.engines.flower.superlink import Options, SuperLink, words_of
from fedraclora.errors import ConfigError, EngineError
from fedraclora.runfolder import is_finished, read_summary
from fedraclora.settings import FlowerConfig, PretrainConfig
from strategies.server_app import read_config, settings_of

FAILED = "Simulation failed with exception: "  # how Flower begins


@dataclass(frozen=True)
class Order:
    """What ``flwr run`` is asked for.

    Attributes:
        config: Checked settings.
        folder: The run folder, absolute.
        resume: Whether to go on with the run in it.
        options: Flower's own: nodes and resources.
    """

    config: RunConfig
    folder: Path
    resume: bool
    options: Options

    @property
    def run_config(self) -> str:
        """The run config of the app, as TOML."""
        return run_config_of(self.config, resume=self.resume)


def prepare(words: Sequence[str]) -> Order:
    """Compose and check a run.

    Raises:
        FedRacLoraError: Whatever is wrong with what is asked for.
    """
    words = searched(words)
    asked = composed(["engine=flower", *words])
    typed = [key_of(word) for word in words]
    plain, folder, resume = choose(asked, typed, None)
    folder = folder.resolve()
    output = plain["output"] if isinstance(plain["output"], dict) else {}
    # The engine is what this command is for, also where a run goes on that began elsewhere.
    plain = {**plain, "engine": asked["engine"], "output": {**output, "dir": str(folder)}}
    config = read_config(json.dumps(plain), began=resume)
    built = build_task(replace(config, pretrain=PretrainConfig()))
    settings = settings_of(config)
    if not isinstance(settings, FlowerConfig):
        raise ConfigError(f"engine is {settings.name}: that is for fedraclora deploy")
    options = run_options(settings, built.device.type, built.clients)
    return Order(config, folder, resume, options)


def run(order: Order) -> None:
    """Have ``flwr run`` run it, and print the outcome.

    Raises:
        EngineError: If it did not come to its end, with what Flower says.
    """
    with SuperLink(show=order.config.output.progress) as link:
        run_config = link.home / "run.toml"
        run_config.write_text(order.run_config)
        copy_app(link.home / "app")
        ended = link.run_app(link.home / "app", run_config, order.options)
    if not ended.completed or not is_finished(order.folder):
        print(ended.log, end="", file=sys.stderr)
        raise EngineError(f"{ended.details.removeprefix(FAILED)} ({ended.status})")
    conclude(read_summary(order.folder), order.folder)


def write(order: Order, path: Path) -> None:
    """Write the run config for a ``flwr run`` by hand, and print that command.

    Without a checkout the app is written, too, into a folder beside it.
    """
    if path.suffix != ".toml":
        raise ConfigError(f"--write {path}: Flower reads a run config from a file named *.toml")
    path.write_text(order.run_config)
    app = checkout()
    if app is None:
        app = path.with_name(f"{path.stem}-app")
        copy_app(app)
    options = f"--federation-config {shlex.quote(words_of(order.options))}"
    print(f"flwr run {shlex.quote(str(app))} --stream -c {shlex.quote(str(path))} {options}")


@reported
@in_order()
def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; the status is that of the run."""
    parser = argparse.ArgumentParser(
        prog="fedraclora flower", description=str(__doc__).partition(": ")[2]
    )
    parser.add_argument("overrides", nargs="*", help="as for fedraclora simulate")
    parser.add_argument(
        "--write", metavar="FILE.toml", type=Path, help="write the run config, and do not run"
    )
    parser.add_argument("--cfg", "-c", metavar="job", help="print the config, and do not run")
    parser.add_argument(
        "--config-dir", "-cd", metavar="DIR", help="a folder with config files of your own"
    )
    words = sys.argv[1:] if words is None else list(words)
    if shown(["engine=flower", *words]):
        return 0
    asked = parser.parse_intermixed_args(words)
    folder = [] if asked.config_dir is None else ["--config-dir", asked.config_dir]
    order = prepare([*folder, *asked.overrides])
    if asked.write is not None:
        write(order, asked.write)
    elif not is_done(order.folder, order.config.plain, resume=order.resume):
        run(order)
    return 0


if __name__ == "__main__":
    sys.exit(main())
