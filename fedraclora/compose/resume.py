"""Resume a run: accept changed keys that do not change results, reject all others by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fedraclora.binding import PlainDict, section
from fedraclora.config.build import pick_device
from fedraclora.config.resuming import (
    CLIENTS,
    DATA_CLIENTS,
    GROWS,
    fixed_clients,
    free_keys,
    plans_rounds,
)
from fedraclora.config.run_config import ENGINE_IN_DIGEST, digested
from fedraclora.errors import CheckpointError, ConfigError, EngineError, FedRacLoraError
from fedraclora.run.digests import known_data
from fedraclora.run.folder import (
    has_begun,
    is_finished,
    read_config,
    read_summary,
    resume_word,
)
from fedraclora.run.ledger import reached_round
from fedraclora.run.recorder import checkpoint_meta, resolved_setting
from fedraclora.run.stopped import divergence
from fedraclora.strategies.methods import METHODS
from fedraclora.training.localconfig import AUTO
from fedraclora.trust import names_in, trust_word
from fedraclora.weights.files import config_difference, flatten

RATE = "local.lr"


def resume_config(
    folder: Path, stored: Mapping[str, object], plain: PlainDict, typed: Sequence[str] | None
) -> PlainDict:
    """Build the config of a resumed run.

    Args:
        folder: The run folder.
        stored: Its config.
        plain: The config of this call.
        typed: The keys that the user typed; None: all of ``plain`` (``resume=auto``).

    Returns:
        The stored config, with the permitted changes from ``plain``.

    Raises:
        CheckpointError: Naming each key that may not change.
        ConfigError: If all of ``plain`` counts, and it lacks the data or the model of the run.
    """
    refused = []
    if typed is not None and "experiment" in typed:
        refused.append("experiment: a preset cannot be applied to a resumed run. Leave it out.")
    taken: PlainDict = {}
    left, right = digested(stored, METHODS), digested(plain, METHODS)
    old, new = flatten(stored), flatten(plain)
    for found in config_difference(left, right):
        key, line = found.partition(":")[0], found
        if key in old and key in new:  # a digest leaves out some defaults
            line = f"{key}: {json.dumps(old[key])} -> {json.dumps(new[key])}"
            line += _code_has_changed(old[key], new[key])
        if key.startswith("engine.") or not _meant(key, typed, right):
            continue
        if key == RATE and new.get(key) == AUTO:  # the run has found one
            continue
        why = _refusal(folder, key, stored, plain)
        if why is None and key in new:
            taken[key] = new[key]
        else:
            refused.append(f"{line}{why or ''}")
    engine = _engine(section(stored, "engine"), section(plain, "engine"), typed)
    for key in ENGINE_IN_DIGEST:
        was = section(stored, "engine").get(key)
        if engine.get(key) != was:
            texts = (json.dumps(was), json.dumps(engine.get(key)))
            refused.append(f"engine.{key}: {texts[0]} -> {texts[1]} (it changes the results)")
    output, wrong = _output(folder, section(stored, "output"), section(plain, "output"), typed)
    refused += wrong
    if refused:
        if typed is None:
            _refuse_others(folder, stored, plain, [line.partition(":")[0] for line in refused])
        how = "Give these keys as they were" if typed is None else "Leave these keys out"
        raise CheckpointError(
            f"{folder} was run with another config, and cannot be resumed with this one:\n  "
            + "\n  ".join(refused)
            + f"\n{how} to resume it, or start a new run without resume"
        )
    if CLIENTS in taken and DATA_CLIENTS in old:
        taken[DATA_CLIENTS] = taken[CLIENTS]
    taken |= _root(new, typed)
    return with_changes({**stored, "engine": engine, "output": output}, taken)


def _root(new: PlainDict, typed: Sequence[str] | None) -> PlainDict:
    """Return the folder of the data if this call gives one."""
    key = "data.root"
    return {key: new[key]} if key in new and (typed is None or key in typed) else {}


def _refuse_others(
    folder: Path, stored: Mapping[str, object], plain: PlainDict, refused: Sequence[str]
) -> None:
    """Reject a call that lacks the data or the model of a run, and name everything it lacks.

    Raises:
        ConfigError: Naming the keys, in their form in Python and on the command line.
    """
    old, new = section(stored, "data"), section(plain, "data")
    named = {group: section(stored, group).get("name") for group in ("data", "model")}
    others = {g: name for g, name in named.items() if name != section(plain, g).get("name")}
    if not others:
        return
    keys = dict.fromkeys([*others, *(key.partition(".")[0] for key in refused)])
    keys |= dict.fromkeys(key for key in ("loss", "metrics") if old.get(key) != new.get(key))
    held = " and ".join(f"{group}={name}" for group, name in others.items())
    raise ConfigError(
        f"{folder} holds a run of {held}, but this call names others. To resume it, give again "
        f"as at its start: {', '.join(keys)}"
    )


def _code_has_changed(was: object, now: object) -> str:
    """Report two objects of a program with the same name but different digests."""
    (old, _, one), (new, _, other) = (str(value).partition("@") for value in (was, now))
    return " (its code, or what it names, has changed)" if old == new and one and other else ""


def is_done(folder: Path, plain: Mapping[str, object]) -> bool:
    """Return whether the run of a folder has finished its configured rounds."""
    if not is_finished(folder):
        return False
    summary = read_summary(folder)
    return summary.get("stopped") is True or summary.get("rounds") == plain.get("rounds")


@contextmanager
def explaining_resume(
    folder: Path, command: str, *, there: Callable[[], int | None] | None = None
) -> Iterator[None]:
    """On an interruption inside, note the state of the run and how to resume it.

    It does so, too, if the engine or the disk ends a run that can be resumed.

    Args:
        folder: The run folder.
        command: The command that runs it: simulate, or another with its own arguments.
        there: If checkpoints are on another machine: returns the round of the last one, or None if
            that is not known.
    """
    try:
        yield
    except (KeyboardInterrupt, EngineError, OSError) as error:
        with suppress(FedRacLoraError):  # what cannot be read must not hide how it ended
            if has_begun(folder):
                modules = trust_word(names_in(read_config(folder)).values())
                again = (
                    f"resume with: fedraclora {command} {resume_word(folder)} {modules}".rstrip()
                )
                error.add_note(f"{_progress(folder, there)}; {again}")
        raise


def _progress(folder: Path, there: Callable[[], int | None] | None) -> str:
    done, config = reached_round(folder), read_config(folder)
    every = int(str(section(config, "output")["checkpoint_every"]))
    kept = checkpoint_meta(folder).get("round") if there is None else there()
    done = max(done, int(str(kept or 0)))  # the server's last rows may not have come
    if there is not None and kept is None and (last := done - done % every) < done:
        stands = (
            "and goes on there if the server could save it as it stopped. Otherwise it goes on "
            f"after round {last}, its last regular checkpoint (output.checkpoint_every={every})"
        )
    elif there is not None and kept is None:
        stands = "where the server has a checkpoint"
    elif kept is None:
        stands = "before its first checkpoint, so that it will begin again"
    else:
        stands = f"with a checkpoint after round {kept}: {done - int(str(kept))} will be run again"
    return f"after round {done} of {config.get('rounds')}, {stands}"


def _meant(key: str, typed: Sequence[str] | None, plain: Mapping[str, object]) -> bool:
    """Return whether the user set a key; a chosen group counts by its name."""
    if typed is None:
        return True
    chosen = {f"{k}.name" if isinstance(plain.get(k), dict) else k for k in typed}
    return key in chosen or any(key.startswith(f"{k}.") for k in typed if "." in k)


def _refusal(folder: Path, key: str, stored: Mapping[str, object], plain: PlainDict) -> str | None:
    """Explain why a run cannot be resumed with another value of a key; None if it can."""
    if key == "device":
        before = resolved_setting(folder, "device") or _device(str(stored.get("device")))
        return None if _device(str(plain["device"])) == before else ""
    if key == "rounds":
        return _refused_rounds(folder, stored, int(str(plain["rounds"])))
    if key in GROWS:
        return _refused_clients(stored, plain)
    if key.startswith("data.") and key in free_keys(stored):
        known = key.partition(".")[2] in known_data(folder)
        return None if known else " (without a checksum that the data are the same)"
    if key == RATE and divergence(folder) is not None:
        return None
    return None if key in free_keys(stored) else ""


def _refused_rounds(folder: Path, stored: Mapping[str, object], rounds: int) -> str | None:
    """Explain why a run cannot be resumed with another last round; None if it can."""
    if planned := plans_rounds(stored):
        return f" ({planned} is planned over all rounds)"
    done = checkpoint_meta(folder).get("round")
    if done is not None and rounds < done:
        return f" (it stands at round {done})"
    if is_finished(folder) and read_summary(folder).get("stopped"):
        return f" (it was ended by stop.patience or a callback, after round {done})"
    return None


def _refused_clients(stored: Mapping[str, object], plain: PlainDict) -> str | None:
    """Explain why a run cannot be resumed with another number of clients; None if it can."""
    if (why := fixed_clients(stored)) is not None:
        return f" ({why})"
    before, after = (config.get(CLIENTS) for config in (stored, plain))
    if isinstance(before, int) and isinstance(after, int) and after > before:
        return None
    return f" (clients may join: set {CLIENTS} above {before}; one that leaves counts as absent)"


def _device(name: str) -> str | None:
    try:
        return pick_device(name).type
    except ConfigError:
        return None


def _engine(old: PlainDict, new: PlainDict, typed: Sequence[str] | None) -> PlainDict:
    """Choose the engine of a resumed run; an engine with an automatic chunk keeps the run's."""
    leaves = set(new) if typed is None else {k.partition(".")[2] for k in typed if "engine" in k}
    if typed is not None and "engine" not in typed:
        return {**old, **{k: v for k, v in new.items() if k in leaves and k in old}}
    if old.get("name") == new.get("name"):
        return {**old, **{k: v for k, v in new.items() if k in leaves}}
    fixed = {k for k in ENGINE_IN_DIGEST if k not in leaves or typed is None}
    fixed = {k for k in fixed if k != "chunk" or new.get("chunk") == "auto"}
    return {**new, **{k: old[k] for k in fixed if k in old}}


def _output(
    folder: Path, old: PlainDict, new: PlainDict, typed: Sequence[str] | None
) -> tuple[PlainDict, list[str]]:
    """Choose where and how the resumed run writes, and list the rejected changes."""
    keys = [*new] if typed is None or "output" in typed else []
    keys = keys or [k.partition(".")[2] for k in typed or () if k.startswith("output.")]
    if typed is not None:
        asked = new.get("dir")
        if "dir" in keys and asked is not None and Path(str(asked)).resolve() != folder.resolve():
            return old, [f"output.dir: {folder} -> {asked} (a run resumes in its own folder)"]
        keys = [key for key in keys if key != "dir"]
    if "chain" in keys and new.get("chain") and old.get("chain") is False:
        return old, ["output.chain: false -> true (the updates of its first rounds were not kept)"]
    return {**old, **{key: new[key] for key in keys if key in new}}, []


def with_changes(config: PlainDict, changes: PlainDict) -> PlainDict:
    """Replace values of a config: whole keys, dotted keys, or some keys of a group.

    Example:
        >>> with_changes({"seed": 0, "local": {"lr": 0.1}}, {"seed": 1, "local.lr": 0.2})
        {'seed': 1, 'local': {'lr': 0.2}}
    """
    found = dict(config)
    for key, value in changes.items():
        group, _, leaf = key.partition(".")
        inner = found.get(group)
        more = {leaf: value} if leaf else value
        if isinstance(inner, dict) and isinstance(more, dict):
            found[group] = {**inner, **more}
        else:
            found[key] = value
    return found
