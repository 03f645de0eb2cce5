"""The folder of a run: create, lock, check and close it with a summary."""

from __future__ import annotations

import fcntl
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from fedraclora.binding import Plain, section
from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.run.digests import check_config, data_files, read_sealed, sealed, write_digests
from fedraclora.run.ledger import reached_round, read_ledger, seals
from fedraclora.run.recorder import RESUMED_FROM
from fedraclora.weights.files import (
    config_difference,
    is_private,
    make_folder,
    open_lock,
    refuse_links,
    write_text,
)

LEDGER = "ledger_sha256"  # of the summary: the seal of the ledger's last row
# What a start makes; the lock comes last, so that nobody else begins meanwhile.
MADE = ("digests.json", "config.yaml", "ledger.jsonl", "chain", "private", "run_id", ".lock")
GROUPS = ("method", "data", "local", "engine", "output")  # of every config
SIGNS = (*MADE[:1], *MADE[2:3])  # one of them lies in every run folder
# The safe loader, in C where PyYAML was built with it: ten times as fast, and tables read many.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
PACKAGES = ("fedraclora", "flwr", "torch", "numpy", "hydra-core")


def is_finished(folder: Path) -> bool:
    """Return whether the run of a folder is finished."""
    return (folder / "summary.json").is_file()


def is_ours(folder: Path) -> bool:
    """Return whether a run has written into a folder."""
    digests, ledger = (folder / name for name in SIGNS)
    return ledger.is_file() or (digests.is_file() and b'"config"' in digests.read_bytes())


def has_begun(folder: Path) -> bool:
    """Check whether a folder holds a run that has come to its first row, or more.

    What holds less was a start that failed or was killed: nothing is lost where another is made.

    Raises:
        CheckpointError: If its ledger is damaged.
    """
    later = ("summary.json", "checkpoint/checkpoint.safetensors")
    if not is_ours(folder):
        return False
    if any((folder / name).exists() for name in later):
        return True
    ledger = folder / "ledger.jsonl"
    return ledger.is_file() and bool(read_ledger(ledger))


def resume_word(folder: Path) -> str:
    r"""Return the argument that resumes a run, quoted for a shell.

    Example:
        >>> resume_word(Path("runs/a")), resume_word(Path("sweep/seed=1"))
        ('resume=runs/a', '"resume=\'sweep/seed=1\'"')
    """
    plain = re.fullmatch(r"[\w./~+-]+", str(folder)) is not None
    return f"resume={folder}" if plain else f"\"resume='{folder}'\""


def refuse_existing(folder: Path) -> None:
    """Reject a folder that already has a run, or something that no run has written.

    Hidden files may be there: Hydra's own, those of a file manager. So may the key of another
    private run, put there to draw what that drew.

    Raises:
        CheckpointError: If a run is there already.
        ConfigError: If something else is.
    """
    if has_begun(folder):
        raise CheckpointError(
            f"{folder} holds a run already. Choose another output.dir, or resume it with "
            f"{resume_word(folder)}"
        )
    if not folder.is_dir() or is_ours(folder):
        return
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    known = ("run_id", *SIGNS[:1], "private")  # digests may be torn by a kill
    if names := [name for name in names if name not in known]:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise ConfigError(
            f"{folder} holds {names[0]}{more} and no run, and a run could overwrite these "
            "files. Name a new or an empty folder"
        )


def refuse_full(folder: Path) -> None:
    """Reject a folder that is not empty, or a file in its place: what is there would be mixed up.

    Raises:
        ConfigError: Naming it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty. Name a new folder")


@contextmanager
def new_folder(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Make and hold the folder of a new run; take it away where the run fails before it has begun.

    What was there before stays, and so does a folder that holds something else.

    Args:
        folder: It.
        shared: As for `make`.

    Raises:
        FedRacLoraError: As `refuse_existing` and `alone`.
    """
    refuse_existing(folder)
    known = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with alone(folder, shared=shared):
        try:
            yield
        except BaseException:
            with suppress(OSError):  # it stays as it was found
                if not has_begun(folder):
                    _remove(folder, [name for name in MADE if name not in known])
                    for path in made:
                        path.rmdir()
            raise


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def begin_folder(folder: Path, plain: Plain) -> None:
    """Write the config of a new run into its folder, with digests of it and of the data's files.

    What a start that was killed has left makes room.
    """
    if (folder / "config.yaml").exists():
        _remove(folder, ("ledger.jsonl", "chain", "private"))
    _write_config(folder, plain, data_files(section(plain, "data")))


def _write_config(folder: Path, plain: Plain, data: Mapping[str, object] | None) -> None:
    """Write a config, its digest first; ``data`` as for `write_digests`."""
    text = yaml.safe_dump(plain, sort_keys=False)
    write_digests(folder, text, data)
    write_text(folder / "config.yaml", text)


def read_config(folder: Path) -> Plain:
    """Read the resolved config of a run.

    Raises:
        CheckpointError: If the folder has none, or it was changed since the run wrote it.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a run folder: it has no config.yaml. Name the folder of a run"
        )
    try:
        loaded = yaml.load(check_config(folder), LOADER)  # noqa: S506  it is a safe one
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes that are no text, too
        raise CheckpointError(
            f"{path} is damaged: {error}. Restore the config file from a copy"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(k), dict) for k in GROUPS):
        raise CheckpointError(
            f"{path} does not contain the config of a run. Restore the file from a copy, or "
            "name another folder"
        )
    return loaded


def amend(folder: Path, plain: Plain) -> list[str]:
    """Write the config under which a run goes on, where that is another than it was.

    A summary goes: the run has not come to its end any more.

    Returns:
        One line for each key that is another, for the ledger; where output goes is left out.
    """
    stored = read_config(folder)
    if stored == plain:
        return []
    (folder / "summary.json").unlink(missing_ok=True)
    _write_config(folder, plain, None)
    # Keys that one side lacks came or went with the choice of their group, which is named.
    changed = [line for line in config_difference(stored, plain) if "(absent)" not in line]
    return [f"goes on with {x}" for x in changed if not x.startswith(("output.", "resume:"))]


def has_checkpoint(folder: Path, every: int) -> bool:
    """Check whether a run can go on, or was killed so early that it must start again.

    A run that was killed before its first checkpoint is cleared, so that it can. It is another run
    then, with a key and a name of its own: what the first attempt drew must not be drawn again.

    Args:
        folder: The run folder.
        every: Rounds between checkpoints.

    Raises:
        CheckpointError: If the ledger shows that there was a checkpoint, and it is gone.
    """
    if (folder / "checkpoint" / "checkpoint.safetensors").is_file():
        return True
    if (reached := reached_round(folder)) > every:
        raise CheckpointError(
            f"{folder} has no checkpoint, although its ledger reaches round {reached}. "
            "Restore the checkpoint from a copy, or start a new run in another folder"
        )
    for name in ("ledger.jsonl", *RESUMED_FROM):
        (folder / name).unlink(missing_ok=True)
    return False


@contextmanager
def alone(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Make and lock a run folder for this process; the lock ends with the process.

    Args:
        folder: It.
        shared: As for `make`.

    Raises:
        CheckpointError: If another process runs in the folder.
        ConfigError: If the folder cannot be made, or a link in it leads out of it.
    """
    make(folder, shared=shared)
    refuse_links(folder)
    try:
        lock = open_lock(folder / ".lock")
    except PermissionError as error:
        raise CheckpointError(
            f"output.dir={folder}: another user owns its lock ({error}). Choose another "
            "output.dir, or share the folder with a group that may write "
            "(output.shared=true, umask 002)"
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is running in {folder}. Wait until it ends, or choose "
                "another output.dir"
            ) from error
        yield


def is_running(folder: Path) -> bool:
    """Check whether a process holds a run folder now; False where this user may not look."""
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def make(folder: Path, *, shared: bool = False) -> None:
    """Make a run folder, which nobody but its owner may enter; so files in it are private, too.

    Args:
        folder: It. Of a folder that is there, empty, others lose their rights; one with a run keeps
            its mode.
        shared: Whether others have the rights that the umask leaves them.

    Raises:
        ConfigError: If that cannot be.
    """
    try:
        make_folder(folder, private=not shared)
        if not (shared or is_private(folder) or is_ours(folder)):
            folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder} ({error}). Choose another output.dir (or "
            "engine.folder, for the server of `fedraclora deploy connection=`)"
        ) from error


def run_id(folder: Path, *, shared: bool = False) -> str:
    """Name a run for those who keep something of it elsewhere; the name stays in its folder.

    Args:
        folder: Of the run; made where it is missing.
        shared: As for `make`.

    Raises:
        ConfigError: If the folder cannot be made.
    """
    path = folder / "run_id"
    if not path.is_file():
        make(folder, shared=shared)
        write_text(path, secrets.token_hex(16))
    return path.read_text()


def write_summary(folder: Path, summary: Mapping[str, object]) -> None:
    """Write summary.json in one move, with versions, revision and the digest of the ledger."""
    rows = read_ledger(folder / "ledger.jsonl")
    found = {**summary, **provenance(), LEDGER: [*seals(rows)][-1]}
    write_text(folder / "summary.json", sealed(found))


def read_summary(folder: Path) -> dict[str, object]:
    """Read the summary of a finished run; it must be that of the ledger beside it.

    Raises:
        CheckpointError: If a file is damaged, missing or of another run.
    """
    path = folder / "summary.json"
    found = read_sealed(path)
    if "weights_digest" not in found:
        raise CheckpointError(f"{path} is not the summary of a run. Restore it from a copy")
    if found.get(LEDGER) != ["", *seals(read_ledger(folder / "ledger.jsonl"))][-1]:
        raise CheckpointError(
            f"{path} and the ledger.jsonl beside it do not belong together, or one of them "
            "was changed. Restore both from a copy"
        )
    return found


def provenance() -> dict[str, object]:
    """Return the versions and the commit of the code that a result depends on."""
    return {"versions": versions_of(PACKAGES), "git": git_revision()}


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Give the versions of those packages that are installed."""
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):  # a bundle of Flower's runs where nothing is installed
            versions[package] = version(package)
    return versions


@cache
def git_revision() -> str | None:
    """Read the revision of the checkout that runs, with a plus where files differ from it.

    None for an installed package, also where it lies in the folder of another project, and where
    there is no git, as in small images.

    That of the first call: what a process runs is what it has loaded.
    """
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(here), *words],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip()

    if shutil.which("git") is None or not git("ls-files", Path(__file__).name):
        return None
    revision = git("rev-parse", "--short=12", "HEAD")
    return f"{revision}{'+' if git('status', '--porcelain', '-uno') else ''}" if revision else None
