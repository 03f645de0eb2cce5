"""What a Python program calls: ``import fedraclora; fedraclora.simulate(...)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from experiments import Plain
from experiments.resume import is_done
from experiments.simulate import carry_out, choose
from experiments.values import config_of
from fedraclora.config.build import settled
from fedraclora.config.run_config import from_plain
from fedraclora.config.schema import section
from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.run.folder import has_begun
from strategies import METHODS
from strategies.outcome import Run, finished
from strategies.server.rows import Row

__all__ = ["Run", "simulate"]

OF_MEMORY = ("output.dir", "output.progress")  # keys of `output` that a run in memory reads


def simulate(
    *choices: str | Mapping[str, object],
    folder: str | Path | None = None,
    resume: bool = False,
    on_round: Callable[[Row], None] | None = None,
    **keys: object,
) -> Run:
    """Run a federated method on a task in this process, to its end.

    What is not said is as in ``conf/config.yaml``, so that the same words give the same bits as
    ``fedraclora simulate``. The engine is one of the config, too: ``engine=vectorised`` (many
    clients as one batch), ``inline``, ``ray`` or ``flower``.

    Args:
        choices: Words of the command line (``"method=ffa_lora"``, ``"local.lr=0.1"``), or nested
            mappings that say the same (``{"method": "ffa_lora", "local": {"lr": 0.1}}``; in a
            group ``name`` chooses its file). A mapping with every key of the config, such as
            `Run.config`, stands alone: it is taken as it is, but for ``resume`` and
            ``output.dir``, which say where its run was, and ``keys`` are laid over it.
        folder: Where the run leaves its files, as ``output.dir``; None with ``output.dir=null``:
            it runs in memory and leaves nothing behind.
        resume: Go on with the run in the folder; where there is none, begin it. A run that has
            come to its end is read, and not run again.
        on_round: Called with each new row of the history: a dict, see `Run.history`. What it
            raises stops the run, which can be resumed.
        keys: Further choices: a value (``rounds=5``), the name of a choice (``method="fedavg"``),
            or a mapping of a group's keys (``local={"lr": 0.1}``).

    Returns:
        The run: ``history`` (rows of the ledger), ``weights()`` (name of a parameter -> tensor of
        its shape, float32 unless the data have another type), ``summary``, ``folder``, ``config``.

    Raises:
        ConfigError: If a key, a choice or a value is wrong, or the parts do not go together: the
            same error as on the command line.
        CheckpointError: If the folder holds a run already, or one of another config.
        FedRacLoraError: Whatever goes wrong in the run, as ClientError where clients fail.

    Note:
        As in every run, torch is set to ``engine.threads`` threads in this process.

    Example:
        >>> import fedraclora
        >>> small = {"data": "digits", "pretrain": "none", "output": {"progress": False}}
        >>> run = fedraclora.simulate(
        ...     "method=ffa_lora", small, model={"hidden": [12]}, clients=8, cohort=4, rounds=2
        ... )
        >>> [row["round"] for row in run.history], sorted(run.history[-1]["metrics"])
        ([0, 1, 2], ['accuracy', 'loss'])
        >>> tuple(run.weights()["fc1.weight"].shape)
        (12, 64)
    """
    if not isinstance(resume, bool):
        raise ConfigError(f"resume is {resume!r}; True or False is wanted: the place is folder=...")
    plain, typed = config_of(choices, keys)
    output = section(plain, "output")
    place = place_of(plain, output, folder)
    if place is None:
        if resume:
            raise ConfigError("resume=True goes on with the run in a folder: say folder=... too")
        idle = [k for k in typed if k.startswith("output.") and k not in OF_MEMORY]
        if idle:
            raise ConfigError(
                f"{', '.join(idle)}: a run in memory writes nothing; say folder=... too, or leave "
                "it out"
            )
        return carry_out(settled(plain), None, on_round=on_round)
    asked = {**plain, "output": {**output, "dir": str(place)}, "resume": "auto" if resume else None}
    if not resume and has_begun(place):
        raise CheckpointError(
            f"{place} holds a run already; say resume=True to go on with it, under its own config "
            "(run.config, or config.yaml in the folder, with rounds=... on top), or name another "
            "folder"
        )
    found, place, goes_on = choose(asked, typed, None)
    if goes_on and is_done(place, found):
        return finished(from_plain(found, METHODS, began=True), place)
    return carry_out(found, place, resume=goes_on, on_round=on_round)


def place_of(plain: Plain, output: Plain, folder: str | Path | None) -> Path | None:
    """Give the run folder that is asked for; None: the run is in memory.

    Raises:
        ConfigError: If two folders are named, or one by a key that is for the command line.
    """
    if plain.get("resume") is not None:
        raise ConfigError(
            f"resume is {plain['resume']!r} in the config; in Python say folder=..., resume=True"
        )
    named = output.get("dir")
    if folder is None:
        return None if named is None else Path(str(named)).expanduser()
    place = Path(folder).expanduser()
    if named is not None and Path(str(named)).expanduser() != place:
        raise ConfigError(f"folder is {place}, but output.dir is {named}: name one of them")
    return place
