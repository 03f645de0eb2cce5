"""What a tuning found: the frontier, what to take at which size, its YAML, and its test."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fedraclora.binding import PlainDict
from fedraclora.clients.engines import engine_of
from fedraclora.config.run_config import from_plain
from fedraclora.errors import ClientError
from fedraclora.experiments.choices import groups
from fedraclora.experiments.overrides import composed
from fedraclora.experiments.resume import laid_over
from fedraclora.experiments.tables import Table
from fedraclora.experiments.tune.frontier import Point, frontier
from fedraclora.experiments.tune.search import Search, done, score_of, shown
from fedraclora.experiments.tune.space import KEYS
from fedraclora.objects import LENT, NAME
from fedraclora.plots.axes import MEGABYTE
from fedraclora.run.digests import plans_rounds
from fedraclora.strategies import METHODS
from fedraclora.strategies.outcome import execute

if TYPE_CHECKING:
    from optuna.study import Study
    from pandas import DataFrame

SIZE = "MB a client"  # both ways, of all clients over their number
NOT_WRITTEN = ("output", "engine", "resume")  # of a run, and not of what it trains


@dataclass(frozen=True)
class Tuned:
    """What a tuning found.

    Attributes:
        folder: Where it is kept.
        frontier: A frame of all points that none beats: ``run``, ``rounds``, ``MB a client``, the
            metric on the validation split, and the settings.
        configs: What to take at each of ``tune.sizes``: a config that `fedraclora.simulate` takes.
        test: The metric of the last of these on the test samples, one for each of
            ``tune.test_seeds``; None: it was not tested.
    """

    folder: Path
    frontier: DataFrame
    configs: Mapping[float, PlainDict]
    test: list[float] | None


def outcome(search: Search, *, clients: int, over: bool, has_test: bool) -> Tuned:
    """Print and write what was found so far.

    Args:
        search: The tuning.
        clients: Of the task.
        over: Whether all is run, so that the winner may be tested.
        has_test: Whether there are test samples.
    """
    from pandas import DataFrame

    study, unit = search.study(), MEGABYTE * clients
    params = {trial.number: trial.params for trial in done(study)}
    curves = points_of(search, study)
    every = frontier([p for curve in curves.values() for p in curve], higher=search.higher)
    best = [point for point in every if point.round]  # what is no better than untrained is no use
    records = [record(search, point, params[point.trial], unit) for point in best]
    last = [*{found["run"]: found for found in records}.values()]  # of each run the best point
    Table.of(sorted(last, key=itemgetter(SIZE)), notes(search, study, best)).print()
    shutil.rmtree(search.folder / "experiment", ignore_errors=True)  # of fewer runs, other sizes
    configs, rows, tested = dict[float, PlainDict](), list[dict[str, object]](), None
    for size in sorted(search.config.sizes):
        within = [pair for pair in zip(best, records, strict=True) if pair[0].bytes <= size * unit]
        if not within:
            rows.append({"at": f"{size:g} MB: all need more"})
            continue
        tested, found = within[-1]
        configs[size] = config_of(search, study, tested)
        write_preset(search, configs[size], found, params[tested.trial], f"at_{size:g}MB")
        rows.append({"at": f"{size:g} MB"} | found)
    columns = max(rows, key=len, default={})
    Table.of([{key: row.get(key, "") for key in columns} for row in rows]).print()
    Table.of(records).write(search.folder, "frontier")
    draw(search, curves, best, unit)
    search.say(f"written to {search.folder}: frontier.csv, frontier.png, experiment/at_...MB.yaml")
    if configs:
        words = f"--config-dir {search.folder} experiment=at_{max(configs):g}MB"
        search.say(f"to run it: fedraclora simulate {words}")
    test = None
    if over and tested is not None and has_test:
        test = test_once(search, study, tested, configs[max(configs)])
    elif over and not has_test:
        search.say("not tested: the task has no test samples")
    return Tuned(search.folder, DataFrame(records), configs, test)


def points_of(search: Search, study: Study) -> dict[int, list[Point]]:
    """List what each run measured from round 0 on, but of those that diverged.

    Where the number of rounds decides what each of them does, a run counts at its end alone.
    """
    whole = plans_rounds(search.space.plain) is not None
    found = {}
    for trial in done(study):
        attrs = trial.user_attrs
        if attrs["ended"] == "diverged" or (whole and attrs["ended"]):
            continue
        curve = [replace(Point(**told), trial=trial.number) for told in attrs["curve"]]
        found[trial.number] = [p for p in curve if not whole or p.round in {0, search.rounds}]
    return found


def record(
    search: Search, point: Point, params: Mapping[str, object], unit: float
) -> dict[str, object]:
    """Describe a point of the frontier."""
    short = {key: name for name, key in KEYS.items()}
    told = {short.get(key, key): shown(params[key]) for key in _keys(search) if key in params}
    blank = dict.fromkeys((short.get(key, key) for key in _keys(search)), "")
    return {
        "run": point.trial,
        SIZE: float(f"{point.bytes / unit:.4g}"),
        search.metric: round(point.score, 4),
        "rounds": point.round,
        **(blank | told),
    }


def _keys(search: Search) -> list[str]:
    return ["method", *([KEYS["lr"]] if search.space.rates else []), *search.space.tuned]


def notes(search: Search, study: Study, best: Sequence[Point]) -> list[str]:
    """Say what the table shows, and how many runs there were."""
    trials = done(study)
    ended = [str(trial.user_attrs["ended"]) for trial in trials]
    counts = [f"{ended.count(why)} {why}" for why in ("halved", "diverged") if why in ended]
    several = f", of {len(best)} points in frontier.csv" if len(best) > 1 else ""
    return [
        f"The frontier: each run's best point on it{several}. {search.metric} is of the validation "
        f"split; MB a client are both ways, of all clients over their number. {len(trials)} runs"
        + (f": {', '.join(counts)}." if counts else ".")
    ]


def config_of(search: Search, study: Study, point: Point) -> PlainDict:
    """Return the config of a point of the frontier, as it is to be run: trained on all samples."""
    from optuna.trial import FixedTrial

    (params,) = [trial.params for trial in done(study) if trial.number == point.trial]
    changes: PlainDict = {**search.final, "rounds": point.round}
    return laid_over(search.space.suggest(FixedTrial(params)), changes)


def write_preset(
    search: Search,
    config: PlainDict,
    found: Mapping[str, object],
    tuned: Mapping[str, object],
    title: str,
) -> None:
    """Write a config as a preset: what it chooses, what differs from that, and what was tuned.

    Objects of a Python program are left out: they are given beside it.
    """
    chosen, default = {}, composed([])
    drop = {*NOT_WRITTEN, *(("steps", "callbacks") if search.steps or search.callbacks else ())}
    for group in groups():
        section = config.get(group)
        if group in drop or not isinstance(section, Mapping):
            continue
        name = str(section.get("name"))
        if name == NAME or LENT.fullmatch(name):
            drop.add(group)
        elif group in {"partition", "pretrain"} or name != dict(default[group])["name"]:  # type: ignore[call-overload]
            chosen[group] = name
    base = composed([f"{group}={name}" for group, name in chosen.items()])
    keys = {key: value for key, value in config.items() if key not in drop}
    listed = ["_self_", *({f"override /{group}": name} for group, name in chosen.items())]
    text = yaml.safe_dump({"defaults": listed, **_differing(keys, base, {*tuned})}, sort_keys=False)
    told = ", ".join(f"{key} {value}" for key, value in found.items() if value != "")
    path = search.folder / "experiment" / f"{title}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# @package _global_\n# By fedraclora tune: {told}\n{text}", encoding="utf-8")


def _differing(
    new: Mapping[str, object], old: Mapping[str, object], kept: Collection[str], before: str = ""
) -> PlainDict:
    """Take what is not as in another config, and some dotted keys whatever it is."""
    found: PlainDict = {}
    for key, value in new.items():
        was, path = old.get(key, ...), f"{before}{key}"
        if isinstance(value, Mapping) and isinstance(was, Mapping):
            inner = _differing(value, was, kept, f"{path}.")
            found |= {key: inner} if inner else {}
        elif value != was or path in kept:
            found[key] = value
    return found


def draw(
    search: Search, curves: Mapping[int, Sequence[Point]], best: Sequence[Point], unit: float
) -> None:
    """Draw every run, and the frontier."""
    from fedraclora.plots.comparison import frontier_figure

    def xy(points: Sequence[Point]) -> list[tuple[float, float]]:
        return [(point.bytes / unit, point.score) for point in points if point.round]

    if best:
        frontier_figure(
            [xy(curve) for curve in curves.values()],
            xy(best),
            search.config.sizes,
            search.metric,
            search.folder / "frontier.png",
        )


def test_once(search: Search, study: Study, point: Point, config: PlainDict) -> list[float]:
    """Run the winner on seeds that were not tuned on, measured on the test samples, and say it.

    What has been tested is kept, and not run again.
    """
    key, seeds = [point.trial, point.round], search.config.test_seeds
    before = study.user_attrs.get("tested") or {}
    if before.get("of") != key or before.get("seeds") != seeds:
        scores = []
        for seed in seeds:
            try:
                settings = from_plain(laid_over(config, {"seed": seed}), METHODS)
                found = execute(
                    settings, None, engine_of, callbacks=search.callbacks, steps=search.steps
                ).summary
            except ClientError:  # as in `Search`
                found = {}
            score = score_of(found, search.metric)
            scores.append(math.nan if score is None else score)
        earlier = [*before.get("earlier", []), *([before["of"]] if before else [])]
        before = {"of": key, "seeds": seeds, "scores": scores, "earlier": earlier}
        study.set_user_attr("tested", before)
    scores = [math.nan if s is None else float(s) for s in before["scores"]]
    spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
    told = f"test {search.metric} of run {point.trial}, {point.round} rounds: "
    told += f"{statistics.fmean(scores):.4f}{spread} (seeds {', '.join(map(str, seeds))}"
    if before["earlier"]:
        told += (
            f"; the test samples were looked at {len(before['earlier'])} times before, for others"
        )
    search.say(told + ")")
    return scores
