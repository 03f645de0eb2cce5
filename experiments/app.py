"""A run of ``simulate`` as a Flower app: what the commands ``flower`` and ``deploy`` share."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

from experiments.simulate import report
from fedraclora.config import RunConfig
from fedraclora.errors import ConfigError
from fedraclora.runfolder import is_finished, write_summary

APP = Path(__file__).resolve().parents[1]  # the checkout: its pyproject.toml is the app's


def run_config_of(config: RunConfig, *, resume: bool) -> str:
    """Write the run config of the app, as TOML."""
    # A JSON string is a TOML string, too.
    text = json.dumps(json.dumps(config.plain))
    return f"cfg-json = {text}\nresume = {json.dumps(resume)}\n"


def copy_app(folder: Path) -> None:
    """Copy the files that the app's bundle is made of.

    To make it Flower looks at every file that it finds; beside them lie virtual environments.

    Raises:
        ConfigError: If this is not a checkout.
    """
    if not (APP / "pyproject.toml").is_file():
        raise ConfigError(f"{APP} has no pyproject.toml: a Flower app is made from a checkout")
    project = tomllib.loads((APP / "pyproject.toml").read_text())
    for pattern in ["pyproject.toml", *project["tool"]["flwr"]["app"]["fab-include"]]:
        for path in APP.glob(pattern):
            copy = folder / path.relative_to(APP)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def is_done(folder: Path, *, resume: bool) -> bool:
    """Tell whether a run that is to go on is finished already, and say so."""
    done = resume and is_finished(folder)
    if done:
        print(f"{folder} is finished already")
    return done


def conclude(summary: dict[str, object], folder: Path) -> None:
    """Write the summary that the app gave into the run folder, and print the outcome."""
    write_summary(folder, summary)  # a bundle knows no revision: it is that of this checkout
    report(summary, folder)
