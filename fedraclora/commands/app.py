"""Package a run of ``simulate`` as a Flower app, for ``fedraclora deploy``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

from fedraclora import flower_internals
from fedraclora.binding import PlainDict, section
from fedraclora.commands import CODE
from fedraclora.engines.flower_patches import FLWR, patch
from fedraclora.engines.owner.request import FOLLOWED, RESUME, SENDS, RunRequest
from fedraclora.private_folder import PrivateFolder
from fedraclora.run.ledger import reached_round
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.server_app import BUNDLE, config_from_text
from fedraclora.strategies.wrappers import method_of

ABOVE_THE_APP = ("commands", "compose", "conf", "experiments", "launch.py", "terminal", "tuning")
NOT_OF_THE_APP: tuple[str, ...] = (*ABOVE_THE_APP, "__pycache__", "*.typed", "*.j2")
PROJECT = Path(__file__).with_name("app.toml")  # pyproject.toml: a link to it, or in a wheel a copy


class ServerRun(RunBuilder):
    """A run on a Flower server, recorded in a local folder.

    Args:
        plain: The config, as saved in the local folder.
        folder: The local folder, absolute.
        there: The output folder on the server.
        resume: Whether to resume the run in the folder.

    Raises:
        FedRacLoraError: If the config cannot be built.

    Attributes:
        checkpoint: The round of the server's checkpoint, where a failed run has named it.
    """

    folder: Path
    checkpoint: int | None = None

    def __init__(self, plain: PlainDict, folder: Path, *, there: object, resume: bool) -> None:
        output = {**section(plain, "output"), "dir": str(there)}
        config = config_from_text(json.dumps({**plain, "output": output}), resuming=resume)
        super().__init__(config, folder, resume=resume, pretrain=False)
        self.plain = plain
        _ = self.task  # also reads the nodes' data


def write_app(run: ServerRun, folder: Path) -> tuple[Path, Path]:
    """Write the Flower app and its run config; return the app's folder and the config file."""
    copy_app(folder / "app")
    run_config = folder / "run.toml"
    # Every JSON string is a valid TOML string.
    text = json.dumps(json.dumps(run.config.plain))
    sends, _ = method_of(run.config, run.built.task).floats(run.plan, 1)
    told = {RESUME: run.resume, SENDS: int(sends), BUNDLE: len(bundle_of(folder / "app"))}
    told[FOLLOWED] = reached_round(run.folder) if run.resume else 0
    lines = [f"cfg-json = {text}", *(f"{key} = {json.dumps(value)}" for key, value in told.items())]
    run_config.write_text("\n".join([*lines, ""]))
    return folder / "app", run_config


def owner_request(run: ServerRun) -> RunRequest:
    """Describe a run as the owners of the data will be shown it, with the digest to approve."""
    with PrivateFolder() as made:
        return request_of_files(*write_app(run, Path(made)))


def request_of_files(folder: Path, file: Path) -> RunRequest:
    """Describe the run of an app's folder and its config file, as `write_app` wrote them."""
    app = bundle_of(folder)
    overrides = SimpleNamespace(override_config=flower_internals.config_overrides(file))
    return RunRequest.of(0, app, flower_internals.run_config(app, overrides))


def bundle_of(folder: Path) -> bytes:
    """Build the bundle of an app, as Flower's command line does when we call it."""
    patch(FLWR)
    return flower_internals.app_bundle(folder)


def copy_app(folder: Path) -> None:
    """Copy the files of the app's bundle to a new folder.

    Flower bundles every file of a folder, and a checkout also contains virtual environments. The
    packages are placed inside ``fedraclora``, as in a wheel: at the top level of a bundle they
    would shadow a node's own packages of the same names.
    """
    shutil.copytree(CODE, folder / "fedraclora", ignore=shutil.ignore_patterns(*NOT_OF_THE_APP))
    shutil.copyfile(PROJECT, folder / "pyproject.toml")
