"""Start, resume and read runs, for the commands and `fedraclora.simulate`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from fedraclora.binding import PlainDict, section
from fedraclora.compose.resume import resume_config
from fedraclora.config.build import resolved
from fedraclora.config.run_config import from_plain
from fedraclora.data.locate import user_path
from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.run.folder import is_finished, is_running, resume_word
from fedraclora.run.ledger import reached_round
from fedraclora.run.trusted import read_trusted
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.result import RunResult
from fedraclora.strategies.runner import execute, finished
from fedraclora.strategies.start import resolved_start
from fedraclora.terminal.progress import RunProgress

STARTED = datetime.now()  # one stamp for all jobs of a sweep in this process


def run_shown(run: RunBuilder, *, brief: bool = False) -> RunResult:
    """Run to the end in this process with a progress bar; see `strategies.runner.execute`.

    Args:
        run: What is run.
        brief: Whether only the bar is shown, unless ``output.verbose`` asks for all.
    """
    config = run.config
    output = config.output
    said = {"shown": output.progress, "verbose": output.verbose}
    said["brief"] = brief and not output.verbose
    with RunProgress(config.rounds, label=config.label, **said) as progress:
        return execute(run, progress)


def choose(
    plain: PlainDict, typed: list[str], sweep_job: str | None
) -> tuple[PlainDict, Path, bool]:
    """Decide on folder and config: a new run, or one to resume.

    Returns:
        The config, the folder, and whether to resume.

    Raises:
        CheckpointError: If the folder has another run, or one with another config.
    """
    resume = plain.get("resume")
    if not isinstance(resume, str | None):
        raise ConfigError(f"resume={resume!r}: give the folder of a run, auto or null")
    if resume not in {None, "auto"}:
        folder = user_path("resume", resume)
        return resume_config(folder, read_trusted(folder, plain), plain, typed), folder, True
    plain = resolved_start(resolved(plain))
    folder = run_folder(section(plain, "output"), sweep_job)
    if resume == "auto" and (folder / "config.yaml").is_file():
        return resume_config(folder, read_trusted(folder, plain), plain, None), folder, True
    return plain, folder, False


def run_folder(output: Mapping[str, object], sweep_job: str | None) -> Path:
    """Choose the folder of a run.

    Args:
        output: The group ``output`` of the config.
        sweep_job: The overrides of this job of a sweep, or None outside a sweep.

    Returns:
        ``output.dir``, or a dated folder; each job of a sweep has a subfolder.
    """
    named = output.get("dir")
    kind = "runs" if sweep_job is None else "multirun"
    stamp = Path(kind) / f"{STARTED:%Y-%m-%d}" / f"{STARTED:%H-%M-%S}"
    folder = stamp if named is None else user_path("output.dir", named)
    return folder if sweep_job is None else folder / sweep_job


def stored_run(folder: Path, round_: int | None) -> RunResult:
    """Read a run from its folder.

    Args:
        folder: The run folder.
        round_: The round of the weights; None: the end, which the run must have reached.

    Raises:
        CheckpointError: If it is no run folder, or the run is not finished.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a run folder. Name the folder of a run")
    if (folder / "export.json").is_file():
        raise CheckpointError(f"{folder} is an export of a run: name the folder of the run itself")
    config = from_plain(read_trusted(folder), METHODS, resuming=True)
    if not is_finished(folder) and round_ is None:
        ways = f"resume it first with {resume_word(folder)}"
        if is_running(folder):  # which holds its folder
            ways = f"it is running, at round {reached_round(folder)}: wait for it"
        raise CheckpointError(
            f"{folder}: this run is not finished; {ways}, or choose a round with --round"
        )
    return finished(config, folder)


def measuring_run(folder: Path, round_: int | None) -> RunResult:
    """Read a run as `stored_run` does, and configure torch to round as in the run."""
    run = stored_run(folder, round_)
    run.builder.fix_bits()
    return run
