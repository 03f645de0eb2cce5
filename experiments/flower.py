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
from fedraclora.config.build import build_task
from fedraclora.config.run_config import RunConfig
from fedraclora.config.settings import FlowerConfig, PretrainConfig
from fedraclora.engines.flower.grid import run_options
from fedraclora.engines.flower.superlink import Options, SuperLink, words_of
from fedraclora.errors import ConfigError, EngineError
from fedraclora.run.folder import is_finished, read_summary
from strategies.server_app import read_config, settings_of

FAILED = "Simulation failed with exception: "  # how Flower begins


@dataclass(frozen=True)
class RunRequest:
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


def prepare(words: Sequence[str]) -> RunRequest:
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
    return RunRequest(config, folder, resume, options)


def run(request: RunRequest) -> None:
    """Have ``flwr run`` run it, and print the outcome.

    Raises:
        EngineError: If it did not come to its end, with what Flower says.
    """
    with SuperLink(show=request.config.output.progress) as link:
        run_config = link.home / "run.toml"
        run_config.write_text(request.run_config)
        copy_app(link.home / "app")
        ended = link.run_app(link.home / "app", run_config, request.options)
    if not ended.completed or not is_finished(request.folder):
        print(ended.log, end="", file=sys.stderr)
        raise EngineError(f"{ended.details.removeprefix(FAILED)} ({ended.status})")
    conclude(read_summary(request.folder), request.folder)


def write(request: RunRequest, path: Path) -> None:
    """Write the run config for a ``flwr run`` by hand, and print that command.

    Without a checkout the app is written, too, into a folder beside it.
    """
    if path.suffix != ".toml":
        raise ConfigError(f"--write {path}: Flower reads a run config from a file named *.toml")
    path.write_text(request.run_config)
    app = checkout()
    if app is None:
        app = path.with_name(f"{path.stem}-app")
        copy_app(app)
    options = f"--federation-config {shlex.quote(words_of(request.options))}"
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
    request = prepare([*folder, *asked.overrides])
    if asked.write is not None:
        write(request, asked.write)
    elif not is_done(request.folder, request.config.plain, resume=request.resume):
        run(request)
    return 0


if __name__ == "__main__":
    sys.exit(main())
