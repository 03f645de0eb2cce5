"""Create, lock, check and finish the folder of a run."""

from __future__ import annotations

import fcntl
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from fedraclora.binding import Plain, section
from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.run.digests import check_config, data_files, read_sealed, sealed, write_digests
from fedraclora.run.found_rate import RATES_FILE, FoundRate
from fedraclora.run.ledger import reached_round, read_ledger, seals
from fedraclora.run.log import LOG
from fedraclora.run.recorder import CLIENTS_FILE, RESUMED_FROM
from fedraclora.weights.files import (
    config_difference,
    is_private,
    make_folder,
    open_lock,
    refuse_links,
    write_text,
)

LEDGER = "ledger_sha256"  # key of the summary: the seal of the ledger's last row
# Files of a start; the lock is created last, so that no other process begins meanwhile.
MADE = (
    *("digests.json", "config.yaml", RATES_FILE, "ledger.jsonl", "chain", "private", "run_id"),
    *(LOG, ".lock"),
)
TRIES, LOOK = 4, 0.02  # to take a lock, which `is_running` holds for a moment; seconds between
GROUPS = ("method", "data", "local", "engine", "output")  # keys of every config
SIGNS = (*MADE[:1], *MADE[3:4])  # every run folder has one of these
# The safe loader, in C if PyYAML has it: ten times faster, and tables read many configs.
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
    """Check whether a run folder has at least one ledger row.

    Otherwise a start failed or was killed: a new run may replace it without loss.

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
    """Reject a folder that already has a run, or other files.

    Hidden files are allowed: Hydra's own, or those of a file manager. So is the key of another
    private run, copied to repeat its draws.

    Raises:
        CheckpointError: If it has a run already.
        ConfigError: If it has other files.
    """
    if has_begun(folder):
        raise CheckpointError(
            f"{folder} holds a run already. Choose another output.dir, or resume it with "
            f"{resume_word(folder)}"
        )
    if not folder.is_dir() or is_ours(folder):
        return
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    known = ("run_id", LOG, *SIGNS[:1], "private")  # digests may be incomplete after a kill
    if names := [name for name in names if name not in known]:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise ConfigError(
            f"{folder} holds {names[0]}{more} and no run, and a run could overwrite these "
            "files. Name a new or an empty folder"
        )


def refuse_full(folder: Path) -> None:
    """Reject a folder that is not empty, or a file in its place: files would be mixed.

    Raises:
        ConfigError: Naming it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty. Name a new folder")


@contextmanager
def new_folder(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Create and lock the folder of a new run; remove it if the run fails before its first row.

    Earlier files stay, and so does a folder with other files.

    Args:
        folder: The folder.
        shared: As for `make`.

    Raises:
        FedRacLoraError: As `refuse_existing` and `locked_folder`.
    """
    refuse_existing(folder)
    known = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with locked_folder(folder, shared=shared):
        try:
            yield
        except BaseException:
            with suppress(OSError):  # it stays unchanged
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


def clear_folder(folder: Path) -> None:
    """Remove what a run has written into its folder, so that it can begin anew there."""
    _remove(folder, ("ledger.jsonl", "chain", "private", RATES_FILE, "checkpoint", CLIENTS_FILE))


def begin_folder(folder: Path, plain: Plain, found: FoundRate | None = None) -> None:
    """Write a new run's config into its folder, with checksums of it and of the data files.

    Files of a killed start are removed.

    Args:
        folder: The run folder.
        plain: The config.
        found: How its learning rate was found, if it was.
    """
    if (folder / "config.yaml").exists():
        clear_folder(folder)
    if found is not None:
        found.write(folder)
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
    """Write the config under which a run is resumed, if it changed.

    A summary is removed, since the run is not finished any more.

    Returns:
        One line for each changed key, for the ledger, except output folders.
    """
    stored = read_config(folder)
    if stored == plain:
        return []
    (folder / "summary.json").unlink(missing_ok=True)
    _write_config(folder, plain, None)
    # Keys on one side only came or went with the choice of their group, which is named.
    changed = [line for line in config_difference(stored, plain) if "(absent)" not in line]
    return [f"goes on with {x}" for x in changed if not x.startswith(("output.", "resume:"))]


def has_checkpoint(folder: Path, every: int) -> bool:
    """Check whether a run can be resumed, or was killed so early that it must start again.

    A run that was killed before its first checkpoint is cleared, so that it can start again. It is
    then a new run with its own key and name: the random numbers of the first attempt must not be
    reused.

    Args:
        folder: The run folder.
        every: Rounds between checkpoints.

    Raises:
        CheckpointError: If the ledger shows that there was a checkpoint, and it is missing.
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
def locked_folder(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Create and lock a run folder for this process; the lock ends with the process.

    Args:
        folder: The folder.
        shared: As for `make`.

    Raises:
        CheckpointError: If another process runs in the folder.
        ConfigError: If the folder cannot be created, or a symbolic link leaves it.
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
        for tried in range(TRIES):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if tried == TRIES - 1:
                    raise CheckpointError(
                        f"another process is running in {folder}. Wait until it ends, or choose "
                        "another output.dir"
                    ) from error
                time.sleep(LOOK)
        yield


def is_running(folder: Path) -> bool:
    """Check whether a process holds a run folder; False if this user may not read it."""
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def make(folder: Path, *, shared: bool = False) -> None:
    """Create a run folder that only its owner may enter, so that its files are private, too.

    Args:
        folder: The folder. If it exists and is empty, access of others is removed; one with a run
            keeps its mode.
        shared: Whether others have access as the umask allows.

    Raises:
        ConfigError: If it cannot be created.
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
    """Return a run's name for files kept elsewhere; it is stored in the run folder.

    Args:
        folder: The run folder; created if missing.
        shared: As for `make`.

    Raises:
        ConfigError: If the folder cannot be created.
    """
    path = folder / "run_id"
    if not path.is_file():
        make(folder, shared=shared)
        write_text(path, secrets.token_hex(16))
    return path.read_text()


def write_summary(folder: Path, summary: Mapping[str, object]) -> None:
    """Write summary.json atomically, with versions, revision and the digest of the ledger."""
    rows = read_ledger(folder / "ledger.jsonl")
    found = {**summary, **provenance(), LEDGER: [*seals(rows)][-1]}
    write_text(folder / "summary.json", sealed(found))


def read_summary(folder: Path) -> dict[str, object]:
    """Read the summary of a finished run, and check it against the ledger.

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
    """Return the versions of the installed ones among some packages."""
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):  # a bundle of Flower runs where nothing is installed
            versions[package] = version(package)
    return versions


@cache
def git_revision() -> str | None:
    """Return the revision of this checkout, with a plus if files differ from it.

    None for an installed package, even inside another project's folder, and without git, as in
    small images.

    The result of the first call is kept: a process runs the code that it has loaded.
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
