"""A run of ``simulate`` as a Flower app: what the commands ``flower`` and ``deploy`` share."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path

from experiments.resume import is_done as resume_is_done
from experiments.simulate import report
from fedraclora.config.run_config import RunConfig
from fedraclora.errors import ConfigError
from fedraclora.run.folder import write_summary

ROOT = Path(__file__).resolve().parents[1]  # of the packages: a checkout, or where a wheel is
PROJECT = "pyproject.toml"


def run_config_of(config: RunConfig, *, resume: bool) -> str:
    """Write the run config of the app, as TOML."""
    # A JSON string is a TOML string, too.
    text = json.dumps(json.dumps(config.plain))
    return f"cfg-json = {text}\nresume = {json.dumps(resume)}\n"


def project_file() -> Path:
    """Find the pyproject.toml that says what the app is made of.

    A wheel brings it in this package: what lies beside installed packages is not theirs.

    Raises:
        ConfigError: If there is none.
    """
    for path in (Path(__file__).with_name(PROJECT), ROOT / PROJECT):
        if path.is_file():
            return path
    raise ConfigError(
        f"there is no {PROJECT} in {ROOT}, from which a Flower app is made: install fedraclora "
        "from a wheel, or from a checkout"
    )


def checkout() -> Path | None:
    """Find the checkout that runs, which is a Flower app as it is; None for an installed wheel."""
    return ROOT if project_file().parent == ROOT else None


def copy_app(folder: Path) -> None:
    """Copy the files that the app's bundle is made of.

    To make it Flower looks at every file that it finds; beside them lie virtual environments.

    Raises:
        ConfigError: If they are not all there.
    """
    project = project_file()
    copies = {project: folder / PROJECT}
    for pattern in tomllib.loads(project.read_text())["tool"]["flwr"]["app"]["fab-include"]:
        copies |= {path: folder / path.relative_to(ROOT) for path in ROOT.glob(pattern)}
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def is_done(folder: Path, plain: Mapping[str, object], *, resume: bool) -> bool:
    """Tell whether a run that is to go on is finished already, and say so."""
    done = resume and resume_is_done(folder, plain)
    if done:
        print(f"{folder} is finished already")
    return done


def conclude(summary: dict[str, object], folder: Path) -> None:
    """Write the summary that the app gave into the run folder, and print the outcome."""
    write_summary(folder, summary)  # a bundle knows no revision: it is that of this checkout
    report(summary, folder)
