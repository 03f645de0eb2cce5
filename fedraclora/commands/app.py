"""A run of ``simulate`` as a Flower app, for ``fedraclora deploy``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fedraclora.binding import PlainDict, section
from fedraclora.commands import CODE
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.server_app import config_from_text

ABOVE_THE_APP = ("commands", "compose", "conf", "experiments", "launch.py", "terminal", "tuning")
NOT_OF_THE_APP: tuple[str, ...] = (*ABOVE_THE_APP, "__pycache__", "*.typed", "*.j2")
PROJECT = Path(__file__).with_name("app.toml")  # pyproject.toml: a link to it, or in a wheel a copy


class ServerRun(RunBuilder):
    """A run that a server is to run, with a record of it in a local folder.

    Args:
        plain: The config that the local folder keeps.
        folder: The local folder, absolute.
        there: Where the server writes.
        resume: Whether to go on with the run in the folder.

    Raises:
        FedRacLoraError: Whatever is wrong with what is asked for.
    """

    folder: Path

    def __init__(self, plain: PlainDict, folder: Path, *, there: object, resume: bool) -> None:
        output = {**section(plain, "output"), "dir": str(there)}
        config = config_from_text(json.dumps({**plain, "output": output}), resuming=resume)
        super().__init__(config, folder, resume=resume, pretrain=False)
        self.plain = plain
        _ = self.task  # reads nodes' data, too


def write_app(run: ServerRun, folder: Path) -> tuple[Path, Path]:
    """Write what Flower is given: the folder of the app, and the file of the run config."""
    run_config = folder / "run.toml"
    # A JSON string is a TOML string, too.
    text = json.dumps(json.dumps(run.config.plain))
    run_config.write_text(f"cfg-json = {text}\nresume = {json.dumps(run.resume)}\n")
    copy_app(folder / "app")
    return folder / "app", run_config


def copy_app(folder: Path) -> None:
    """Copy the files that the app's bundle is made of.

    To make it Flower looks at every file that it finds; beside them lie virtual environments. Here
    the folders lie inside ``fedraclora``, as in a wheel: at the top of a bundle they would hide
    packages of those names that a node has.
    """
    shutil.copytree(CODE, folder / "fedraclora", ignore=shutil.ignore_patterns(*NOT_OF_THE_APP))
    shutil.copyfile(PROJECT, folder / "pyproject.toml")
