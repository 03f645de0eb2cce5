"""Compute checksums of a run's config and data files, and list keys that a resume may change.

``digests.json`` is beside ``config.yaml``, which stays a plain file. It contains its own checksum,
as ``summary.json`` does, so that every reader detects a change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedraclora.binding import Plain
from fedraclora.config.resuming import PATHS
from fedraclora.data.locate import file_digest, resolve, user_path
from fedraclora.errors import CheckpointError, ConfigError, DataError
from fedraclora.weights.files import ADVICE, config_difference, write_text

FILE = "digests.json"
SAVED = ("model.safetensors", "history.csv")  # of a result that was saved, with its config beside
SEAL = "sha256"
CODE, ROWS = "code.", "resolved.rows:"  # prefix of differences that no key causes


def sealed(found: Mapping[str, object]) -> str:
    """Write JSON with its own checksum; a value that is not JSON becomes text."""
    plain = json.loads(json.dumps({k: v for k, v in found.items() if k != SEAL}, default=str))
    return json.dumps({**plain, SEAL: _digest(plain)}, indent=1) + "\n"


def opened(found: Mapping[str, object], path: Path) -> dict[str, object]:
    """Verify the checksum in the content of a file, and return the content without it.

    Raises:
        CheckpointError: If the file was changed since it was written.
    """
    rest = {key: value for key, value in found.items() if key != SEAL}
    if found.get(SEAL) != _digest(rest):
        raise CheckpointError(f"{path} is damaged: its checksum does not match; {ADVICE}")
    return rest


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a file of `sealed`, verified.

    Raises:
        CheckpointError: If it is not readable, or was changed since it was written.
    """
    try:
        return opened(dict(json.loads(path.read_text(encoding="utf-8"))), path)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {ADVICE}") from error


def _digest(plain: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_digests(folder: Path, config: str, data: Mapping[str, object] | None) -> None:
    """Write the checksums of a config that is about to be written, and of its data files.

    The checksum of the existing config stays valid, in case the process is killed between the two
    files.

    Args:
        folder: The run folder.
        config: The text of the config.
        data: Digests of `data_files`; None keeps the existing ones.
    """
    path, now = folder / FILE, folder / "config.yaml"
    before = [_text_digest(now.read_bytes())] if now.is_file() else []
    recorded = known_data(folder) if data is None else data
    began = start_folder(folder) if data is None else str(Path.cwd())
    digests = [_text_digest(config.encode()), *before]
    write_text(path, sealed({"config": digests, "data": recorded, "began_in": began}))


def check_config(folder: Path) -> bytes:
    """Read the config of a run folder, and verify its checksum.

    Raises:
        CheckpointError: If it was changed since the run wrote it, or no run wrote it.
    """
    path, digests = folder / "config.yaml", folder / FILE
    if not digests.is_file() and all((folder / file).is_file() for file in SAVED):
        raise CheckpointError(
            f"{folder} is the result that save wrote, not a run folder: it cannot be read as a run "
            f"or resumed. Load {SAVED[0]} with safetensors.torch.load_file, and history.csv with "
            "pandas; for a run to read later, give simulate a folder"
        )
    if not digests.is_file():
        raise CheckpointError(
            f"{folder} is not a run folder: it has no {FILE} beside config.yaml. Name the folder "
            "of a run, or restore that file from a copy"
        )
    text = path.read_bytes()
    if _text_digest(text) not in read_sealed(digests).get("config", ()):
        raise CheckpointError(
            f"{path} is not the config that the run wrote: its checksum is not in {FILE}. "
            "Restore the file from a copy; to change a setting of a resumed run, give it on "
            "the command line, beside resume"
        )
    return text


def check_data(folder: Path, data: Mapping[str, object]) -> None:
    """Check that a run's data files have not changed since it began.

    Args:
        folder: The run folder.
        data: The group ``data`` of the present config.

    Raises:
        DataError: Naming the key, the file, and the owner of the samples.
    """
    if not (stored := known_data(folder)):
        return
    found = data_files(data)
    for key, files in stored.items():
        for name, recorded in files.items():
            now = found.get(key, {}).get(name)
            if now is None:
                raise DataError(
                    f"data.{key}={data.get(key)}: {name}{_owner(key, name)} is missing since "
                    f"the run began in {start_folder(folder)}. Work in that folder, "
                    "restore the file, or start a new run"
                )
            if now != recorded:
                raise DataError(
                    f"data.{key}={data.get(key)}: {name}{_owner(key, name)} has changed since "
                    "the run began. Restore the file, or start a new run without resume"
                )


def check_fixed(
    folder: Path, stored: Mapping[str, object], now: Mapping[str, object], free: tuple[str, ...]
) -> None:
    """Check that settings which influence results equal those of the checkpoint.

    Args:
        folder: The run folder.
        stored: Config, digests of code, and facts found at the start, from the checkpoint.
        now: The present ones.
        free: Keys that may change.

    Raises:
        CheckpointError: Naming the keys, the functions whose code has changed, or the partitioner.
    """
    changed = [x for x in config_difference(stored, now) if not x.startswith(free)]
    # Code and rows on one side only came with another key, which is named.
    changed = [x for x in changed if not (x.startswith((CODE, ROWS)) and "(absent)" in x)]
    anew = "or start a new run without resume"
    code = [x.removeprefix(CODE).rpartition(": ")[0] for x in changed if x.startswith(CODE)]
    if code:
        raise CheckpointError(
            f"{folder}: the code of {', '.join(code)}, or of something that it uses in your "
            f"modules, has changed since the run began. Restore that code, {anew}"
        )
    if any(x.startswith(ROWS) for x in changed) and len(changed) == 1:
        name = str(_get(now, "partition", "name")).partition("@")[0]
        raise CheckpointError(
            f"{folder}: partition={name} assigns other rows to the clients than when the run "
            "began. Make it depend on its arguments only (hash() of a text differs between "
            f"processes), {anew}"
        )
    if changed:
        raise CheckpointError(
            f"{folder}: the checkpoint was written under another configuration "
            f"({'; '.join(changed)}). Set these keys back, {anew}"
        )


def start_folder(folder: Path) -> str:
    """Return the working folder in which a run began."""
    return str(read_sealed(folder / FILE)["began_in"])


def located(folder: Path, data: Plain) -> dict[str, object]:
    """Locate a run's data files, relative to where the run began if they are not here.

    Args:
        folder: The run folder.
        data: The group ``data`` of its config.

    Returns:
        The group; a relative path that does not exist here is taken relative to the folder in which
        the run began.
    """
    began, found = start_folder(folder), dict(data)
    for key, value in data.items():
        if key not in PATHS or not isinstance(value, str) or ":" in value:
            continue
        then = Path(began) / value
        if not any(_paths(key, value, data.get("root"))) and then.exists():
            found[key] = str(then)
    return found


def known_data(folder: Path) -> dict[str, dict[str, str]]:
    """Read the digests of data files from a run folder, as computed by `data_files`."""
    return dict(read_sealed(folder / FILE)["data"])


def data_files(data: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """Compute the SHA-256 of each file that keys of the group ``data`` name, by key and file name.

    For a folder, all files in it. Packages and functions are code and left out, and so is
    ``data.root``, whose data sets have their own digests.
    """
    return {
        key: {path.name: file_digest(path) for path in paths}
        for key, value in data.items()
        if (paths := [*_paths(key, value, data.get("root"))])
    }


def _paths(key: str, value: object, root: object) -> Iterator[Path]:
    if key not in PATHS or not isinstance(value, str) or ":" in value:
        return
    try:
        path = resolve(str(user_path(key, value)), key=key, root=str(root) if root else None)
    except (ConfigError, DataError):
        return  # the reader of the file reports it
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".")


def _owner(key: str, name: str) -> str:
    number = name.partition(".")[0]
    return f", the samples of client {number}," if key == "samples" and number.isdecimal() else ""


def _text_digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _get(plain: Plain, group: str, key: str) -> object:
    found = plain.get(group)
    return found.get(key) if isinstance(found, Mapping) else None
