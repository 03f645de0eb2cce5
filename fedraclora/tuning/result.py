"""The result of a tuning: the Pareto frontier, the best settings at each size, and their test."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from fedraclora.binding import PlainDict
from fedraclora.compose.choices import groups
from fedraclora.compose.overrides import composed
from fedraclora.compose.resume import with_changes
from fedraclora.errors import ClientError
from fedraclora.object_registry import NAME, REGISTERED
from fedraclora.plots.frontier import frontier_figure
from fedraclora.run.statistics import (
    Spread,
    frontier,
    measured_value,
    metric_names,
    steady_within,
)
from fedraclora.terminal.tables import TextTable
from fedraclora.trust import names_in, trust_word
from fedraclora.tuning.search import DIVERGED, HALVED, KEPT, Search, done, shown
from fedraclora.tuning.space import KEYS
from fedraclora.weights.files import keep_private, make_folder

if TYPE_CHECKING:
    from optuna.study import Study
    from pandas import DataFrame

SIZE = "MB a client"  # both ways, of all clients over their number
NOT_WRITTEN = ("output", "engine", "resume")  # of a run, and not of what it trains


class Point(NamedTuple):
    """Hold the state of a run after a round.

    Attributes:
        run: Number of the trial.
        round: Of the run.
        traffic: Bytes of all clients both ways, so far.
        value: The metric.
    """

    run: int
    round: int
    traffic: float
    value: float


@dataclass(frozen=True)
class TuningResult:
    """Hold the result of a tuning.

    Attributes:
        folder: Where it is stored.
        frontier: A frame of the Pareto-optimal points: ``run``, ``rounds``, ``MB a client``, the
            metric on the validation split, and the settings.
        configs: The best config at each of ``tune.sizes``, for `fedraclora.simulate`.
        test: Their metric on the test samples, one for each of ``tune.test_seeds``, NaN for a
            diverged run; empty without a test.
    """

    folder: Path
    frontier: DataFrame
    configs: Mapping[float, PlainDict]
    test: Mapping[float, list[float]]


def outcome(search: Search, *, over: bool, has_test: bool) -> TuningResult:
    """Print and write the results so far.

    Args:
        search: The tuning.
        over: Whether all trials have run, so that the chosen configs may be tested.
        has_test: Whether there are test samples.
    """
    from pandas import DataFrame

    study, unit, folder = search.study(), search.unit, search.folder
    curves = rounds_of_trials(search, study)
    # What is no better than the untrained model is no use.
    best = [point for point in points(frontier(curves, higher=search.higher)) if point.round]
    records = [record(search, study, point, unit) for point in best]
    ends = {found["run"]: found for found in records}  # of each run the best point
    TextTable.of(sorted(ends.values(), key=itemgetter(SIZE)), [note(search, study, best)]).print()
    shutil.rmtree(folder / "experiment", ignore_errors=True)  # of fewer runs, other sizes
    within = {s: taken_within(b, curves, higher=search.higher) for s, b in search.sizes.items()}
    chosen = {size: point for size, point in within.items() if point}
    configs = {size: config_of(search, study, point) for size, point in chosen.items()}
    rows: list[dict[str, object]] = []
    for size, taken in within.items():
        if taken is None:
            rows.append({"at": f"{size:g} MB: {lacking(search, size, curves)}"})
            continue
        rows.append({"at": f"{size:g} MB"} | (found := record(search, study, taken, unit)))
        write_preset(search, configs[size], found, size)
    said = f"What to take: {search.metric} is the mean of a run's last rounds within the size."
    TextTable.of(DataFrame(rows, dtype=object).fillna("").to_dict("records"), [said]).print()
    TextTable.of(records).write(folder, "frontier")
    if best:
        draw(search, study, curves)
    search.say(f"written to {folder}: frontier.csv, frontier.png, experiment/at_...MB.yaml")
    if configs:
        most = float(curves["traffic"].max())
        if most < min(search.sizes.values()):
            search.say(f"no run took over {most / unit:.3g} MB a client: name smaller tune.sizes")
    tests = test_chosen(search, study, chosen, configs, over=over, has_test=has_test)
    return TuningResult(folder, DataFrame(records), configs, tests)


def draw(search: Search, study: Study, curves: DataFrame) -> None:
    """Draw all runs, and the Pareto frontier of each method."""
    methods = curves["run"].map(lambda run: str(study.trials[run].params["method"]))
    groups = {}
    for method, own in curves[curves["round"] > 0].groupby(methods, sort=True):
        runs = [xy(points(curve), search.unit) for _, curve in own.groupby("run", sort=False)]
        best = xy(points(frontier(own, higher=search.higher)), search.unit)
        groups[str(method)] = runs, best
    labels = "MB a client, both ways", f"{search.metric}, validation"
    path, sizes = search.folder / "frontier.png", search.config.sizes
    frontier_figure(groups, labels, path, marks=sizes, higher=search.higher)


def how_to_run(
    folder: Path, configs: Mapping[float, PlainDict], tests: Mapping[float, Sequence[float]]
) -> str:
    """Describe how to run the config of the largest size at which no test diverged."""
    stable = [size for size in configs if all(map(math.isfinite, tests.get(size, ())))]
    if not stable:
        return (
            "every setting diverged on a test seed. Tune again with a smaller tune.lr in "
            "another folder (output.dir)"
        )
    title, registered_object = (
        f"experiment=at_{max(stable):g}MB",
        registered_in(configs[max(stable)]),
    )
    if not registered_object:
        trust = trust_word(names_in(configs[max(configs)]).values())
        return f"to run it: fedraclora simulate --config-dir {folder} {title} {trust}".rstrip()
    given = "".join(f", {key}=..." for key in registered_object)
    return f"to run it: fedraclora.simulate('--config-dir', '{folder}', '{title}'{given})"


def rounds_of_trials(search: Search, study: Study) -> DataFrame:
    """Read the measurements of each run from round 0 on, without diverged runs: run and `KEPT`.

    If the number of rounds changes what each round does, only the last round counts.
    """
    import pandas as pd

    whole, found = search.is_whole, [pd.DataFrame(columns=["run", *KEPT])]
    for trial in done(study):
        ended = trial.user_attrs["ended"]
        curve = pd.DataFrame(trial.user_attrs["curve"]).assign(run=trial.number)
        if ended != DIVERGED and not (whole and ended):
            found.append(curve[curve["round"].isin([0, search.rounds])] if whole else curve)
    return pd.concat(found[1:] or found, ignore_index=True)


def points(rounds: DataFrame) -> list[Point]:
    """Yield the rows of a frame."""
    return [Point(*row) for row in rounds[[*Point._fields]].itertuples(index=False)]


def taken_within(most: float, curves: DataFrame, *, higher: bool) -> Point | None:
    """Choose the best run within a number of bytes, each run at its last round within them.

    The best of many rounds would be chosen by luck. A run that is not better there than the
    untrained model is not chosen.
    """
    ends = steady_within(curves, most)
    untrained = curves.drop_duplicates("run").set_index("run")["value"]
    good = ends[ends["value"] > untrained if higher else ends["value"] < untrained]
    order = {"by": ["value", "traffic"], "ascending": [not higher, True], "kind": "stable"}
    return next(iter(points(good.sort_values(**order).reset_index())), None)


def lacking(search: Search, size: float, curves: DataFrame) -> str:
    """Explain why no run is chosen at a size."""
    if curves.empty:
        return "no run finished (did all diverge?): use a smaller tune.lr in a new output.dir"
    fits = steady_within(curves, search.sizes[size])["round"].any()
    return "none is better than the untrained model" if fits else "all need more"


def xy(shown: Sequence[Point], unit: float) -> list[tuple[float, float]]:
    """Return the coordinates of points in the figure, without the untrained one."""
    return [(point.traffic / unit, point.value) for point in shown if point.round]


def record(search: Search, study: Study, point: Point, unit: float) -> dict[str, object]:
    """Describe a point of the frontier; a setting that its method lacks is empty."""
    short, params = {key: name for name, key in KEYS.items()}, study.trials[point.run].params
    values = search.space.values(params, config_of(search, study, point))
    return {
        "run": point.run,
        SIZE: float(f"{point.traffic / unit:.4g}"),
        search.metric: round(point.value, 4),
        "rounds": point.round,
        **{short.get(k, k): shown(values.get(k, "")) for k in search.space.description()},
    }


def note(search: Search, study: Study, best: Sequence[Point]) -> str:
    """Describe what the table shows, and the number of runs."""
    ended = Counter(trial.user_attrs["ended"] for trial in done(study))
    counts = ", ".join(f"{ended[why]} {why}" for why in (HALVED, DIVERGED) if ended[why])
    several = f", of {len(best)} points in frontier.csv" if len(best) > 1 else ""
    return (
        f"The frontier: each run's best point on it{several}. {search.metric} is of the validation "
        f"split; MB a client are both ways, of all clients over their number. {ended.total()} runs"
        f"{counts and ': '}{counts}."
    )


def config_of(search: Search, study: Study, point: Point) -> PlainDict:
    """Return the config of a point of the frontier for a final run: trained on all samples."""
    from optuna.trial import FixedTrial

    config = search.space.rated(search.space.suggest(FixedTrial(study.trials[point.run].params)))
    return with_changes(config, {**search.final, "rounds": point.round})


def registered_in(config: PlainDict) -> list[str]:
    """List the groups of a config that refer to objects of a Python program."""
    named = [(k, str(v["name"])) for k, v in config.items() if isinstance(v, dict) and "name" in v]
    return [key for key, name in named if name == NAME or REGISTERED.fullmatch(name)]


def write_preset(search: Search, config: PlainDict, found: PlainDict, size: float) -> None:
    """Write a config as a preset: its choices, differences from these, and tuned keys.

    You pass objects of a Python program beside it. Without them the preset is rejected, so that it
    cannot train on other data.
    """
    drop = {*NOT_WRITTEN, *(("steps", "callbacks") if search.steps or search.callbacks else ())}
    named = {k: str(v["name"]) for k, v in config.items() if isinstance(v, Mapping) and "name" in v}
    drop |= {*(registered_object := registered_in(config))}
    chosen = {group: named[group] for group in sorted(groups().keys() & named.keys() - drop)}
    base = composed([f"{group}={name}" for group, name in chosen.items()])
    tuned = search.space.description()
    keys: PlainDict = {"defaults": ["_self_", *({f"override /{k}": v} for k, v in chosen.items())]}
    for key in [key for key in config if key not in drop]:
        new, old = config[key], base.get(key, ...)
        if isinstance(new, dict) and isinstance(old, dict):
            new = {k: v for k, v in new.items() if f"{key}.{k}" in tuned or v != old.get(k, ...)}
        keys |= {} if new in ({}, old) else {key: new}
    keys |= {
        key: {"name": f"what the program gives: simulate({key}=...)"} for key in registered_object
    }
    told = ", ".join(f"{key} {value}" for key, value in found.items() if value != "")
    text = f"# @package _global_\n# By fedraclora tune: {told}\n"
    path = preset_path(search.folder, size)
    make_folder(path.parent)
    path.write_text(text + yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    keep_private(path)


def preset_path(folder: Path, size: float) -> Path:
    """Return the file of the preset at a size."""
    return folder / "experiment" / f"at_{size:g}MB.yaml"


def add_to_preset(folder: Path, size: float, text: str) -> None:
    """Write the test results of a preset into its header."""
    path = preset_path(folder, size)
    package, found, keys = path.read_text(encoding="utf-8").split("\n", 2)
    path.write_text("\n".join([package, found, f"# {text}", keys]), encoding="utf-8")


def place(point: Point) -> str:
    """Name a point in stored results."""
    return f"run {point.run}, {point.round} rounds"


def test_chosen(
    search: Search,
    study: Study,
    chosen: Mapping[float, Point],
    configs: Mapping[float, PlainDict],
    *,
    over: bool,
    has_test: bool,
) -> dict[float, list[float]]:
    """Test the config chosen at each size, and print its results and how to run it."""
    tests = dict[float, list[float]]()
    try:
        for size, point in chosen.items() if over and has_test else ():
            tests[size] = test_once(search, study, point, configs[size])
            said = tested(search, point, tests[size])
            search.say(f"at {size:g} MB: {said}")
            add_to_preset(search.folder, size, said)
    finally:  # an interrupted test takes nothing back
        if configs:
            search.say(how_to_run(search.folder, configs, tests))
    if over and not has_test:
        search.say("not tested: the task has no test samples")
    known = {place(point) for point in chosen.values()}
    if tests and (others := len(study.user_attrs.get("tested", {}).keys() - known)):
        search.say(f"the test samples were used before, for {others} other settings")
    return tests


def test_once(search: Search, study: Study, point: Point, config: PlainDict) -> list[float]:
    """Run a chosen config on seeds that were not used for tuning, and evaluate on test samples.

    Results are stored, and tests are not repeated.
    """
    known, seeds = study.user_attrs.get("tested", {}), search.config.test_seeds
    scores = dict[str, float](known.get(place(point), {}))
    for seed in seeds:
        if str(seed) not in scores:
            scores[str(seed)] = math.nan
            with suppress(ClientError):  # as in `Search`
                summary = search.execute(config, seed).summary
                found = measured_value(summary, metric_names(search.metric))
                scores[str(seed)] = math.nan if found is None else found
            study.set_user_attr("tested", {**known, place(point): scores})
    return [float(scores[str(seed)]) for seed in seeds]


def tested(search: Search, point: Point, scores: Sequence[float]) -> str:
    """Describe the test results of a point: the mean, and the seeds on which it diverged."""
    runs = dict(zip(search.config.test_seeds, scores, strict=True))
    finite = {seed: score for seed, score in runs.items() if math.isfinite(score)}
    shown = Spread.of(finite.values()).text(4)
    parts = [f"{shown} ({seeds_of(finite)})"] if finite else []
    if lost := runs.keys() - finite.keys():
        parts.append(f"DIVERGED ({seeds_of(sorted(lost))}): lower local.lr before you use it")
    return f"test {search.metric} of {place(point)}: {', '.join(parts)}"


def seeds_of(seeds: Iterable[int]) -> str:
    """Write a list of seeds as text."""
    return f"seeds {', '.join(map(str, seeds))}"
