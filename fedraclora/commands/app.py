"""A run of ``simulate`` as a Flower app, for ``fedraclora deploy``."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from fedraclora.binding import PlainDict, section
from fedraclora.commands import CODE
from fedraclora.commands.simulate import print_outcome
from fedraclora.compose.resume import is_done
from fedraclora.config.build import BuiltTask, build_task
from fedraclora.config.run_config import RunConfig
from fedraclora.config.settings import DeployConfig, PretrainConfig
from fedraclora.run.folder import write_summary
from fedraclora.strategies.server_app import config_from_text

NOT_OF_THE_APP = ("commands", "compose", "conf", "experiments", "launch.py", "terminal", "tuning")
NOT_OF_THE_APP += ("__pycache__", "*.typed", "*.j2")
PROJECT = Path(__file__).with_name("app.toml")  # pyproject.toml: a link to it, or in a wheel a copy


@dataclass(frozen=True)
class RunRequest:
    """A run that Flower is asked for.

    Attributes:
        config: Checked settings, with the server's folder as ``output.dir``.
        plain: The config that the local folder keeps.
        folder: The local run folder, absolute.
        resume: Whether to go on with the run in it.
        built: Task, device and population.
    """

    config: RunConfig
    plain: dict[str, object]
    folder: Path
    resume: bool
    built: BuiltTask

    @classmethod
    def of(
        cls,
        plain: PlainDict,
        folder: Path,
        engine: PlainDict,
        *,
        there: object,
        resume: bool,
    ) -> RunRequest:
        """Check a run.

        Args:
            plain: The config.
            folder: The local run folder, absolute.
            engine: To go on with where a run began on another one.
            there: Where the server writes.
            resume: Whether to go on with the run in the folder.

        Raises:
            FedRacLoraError: Whatever is wrong with what is asked for.
        """
        if section(plain, "engine").get("name") != DeployConfig.name:
            plain = {**plain, "engine": engine}
        output = {**section(plain, "output"), "dir": str(there)}
        config = config_from_text(json.dumps({**plain, "output": output}), began=resume)
        built = build_task(replace(config, pretrain=PretrainConfig()))  # reads nodes' data, too
        return cls(config, plain, folder, resume, built)

    @property
    def run_config(self) -> str:
        """The run config of the app, as TOML."""
        # A JSON string is a TOML string, too.
        text = json.dumps(json.dumps(self.config.plain))
        return f"cfg-json = {text}\nresume = {json.dumps(self.resume)}\n"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write what Flower is given: the folder of the app, and the file of the run config."""
        run_config = folder / "run.toml"
        run_config.write_text(self.run_config)
        copy_app(folder / "app")
        return folder / "app", run_config

    def is_done(self) -> bool:
        """Check whether a run that is to go on is finished already, and say so."""
        done = self.resume and is_done(self.folder, self.plain)
        if done:
            print(f"{self.folder} is finished already")
        return done

    def conclude(self, summary: PlainDict) -> None:
        """Write the summary that the app gave into the run folder, and print the outcome."""
        write_summary(self.folder, summary)  # a bundle knows no revision: that of this checkout
        print_outcome(summary, self.folder, self.plain)


def copy_app(folder: Path) -> None:
    """Copy the files that the app's bundle is made of.

    To make it Flower looks at every file that it finds; beside them lie virtual environments. Here
    the folders lie inside ``fedraclora``, as in a wheel: at the top of a bundle they would hide
    packages of those names that a node has.
    """
    shutil.copytree(CODE, folder / "fedraclora", ignore=shutil.ignore_patterns(*NOT_OF_THE_APP))
    shutil.copyfile(PROJECT, folder / "pyproject.toml")
