"""``fedraclora flower``: the run of ``simulate``, as a Flower app by ``flwr run`` on this machine.

The words are those of simulate. The config is checked here and goes to the app as JSON; a
SuperLink of this command's own runs the app in Flower's simulation runtime, one node per client,
and what a run leaves behind lands in the run folder. The status is that of the run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from fedraclora.binding import section
from fedraclora.commands.app import RunRequest, checkout, copy_app
from fedraclora.commands.simulate import choose, shows_composed
from fedraclora.compose.overrides import composed, key_of, searched
from fedraclora.compose.resume import told_how_to_go_on
from fedraclora.config.settings import FlowerConfig
from fedraclora.engines.flower.superlink import Options, SuperLink, option_words, run_options
from fedraclora.errors import ConfigError, EngineError
from fedraclora.run.folder import is_finished, read_summary

FAILED = "Simulation failed with exception: "  # how Flower begins


def prepare(words: Sequence[str]) -> RunRequest:
    """Compose and check a run.

    Raises:
        FedRacLoraError: Whatever is wrong with what is asked for.
    """
    words = searched(words)
    asked = composed(["engine=flower", *words])
    plain, folder, resume = choose(asked, [key_of(word) for word in words], None)
    folder, engine = folder.resolve(), section(asked, "engine")
    return RunRequest.of(plain, folder, engine, "flower", there=folder, resume=resume)


def options_of(request: RunRequest) -> Options:
    """Build Flower's own options: nodes and resources."""
    settings, built = cast(FlowerConfig, request.config.engine), request.built
    return run_options(settings, built.device.type, built.clients)


def run(request: RunRequest) -> None:
    """Run it by ``flwr run``, and print the outcome.

    Raises:
        EngineError: If it did not come to its end, with what Flower says.
    """
    options = options_of(request)
    with SuperLink(show=request.config.output.progress) as link:
        ended = link.run_app(*request.write(link.home), options)
    if not ended.completed or not is_finished(request.folder):
        print(ended.log, end="", file=sys.stderr)
        raise EngineError(f"{ended.details.removeprefix(FAILED)} ({ended.word})")
    request.conclude(read_summary(request.folder))


def write(request: RunRequest, path: Path) -> None:
    """Write the run config for a ``flwr run`` by hand, and print that command.

    Without a checkout the app is written, too, into a folder beside it.
    """
    if path.suffix != ".toml":
        raise ConfigError(f"--write {path}: Flower reads a run config from a file named *.toml")
    options = options_of(request)
    path.write_text(request.run_config)
    app = checkout()
    if app is None:
        app = path.with_name(f"{path.stem}-app")
        copy_app(app)
    places = f"{shlex.quote(str(app))} --stream -c {shlex.quote(str(path))}"
    print(f"flwr run {places} --federation-config {shlex.quote(option_words(options))}")


def main(words: Sequence[str]) -> None:
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
    if shows_composed(["engine=flower", *words]):
        return
    asked = parser.parse_intermixed_args(words)
    folder = [] if asked.config_dir is None else ["--config-dir", asked.config_dir]
    request = prepare([*folder, *asked.overrides])
    if asked.write is not None:
        write(request, asked.write)
    elif not request.is_done():
        with told_how_to_go_on(request.folder, "flower"):
            run(request)
