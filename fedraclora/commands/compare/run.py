"""Run methods under equal conditions and compare them: `fedraclora.compare`.

Each run is an ordinary run, in a folder that is named by the row of the comparison and by a digest
of its settings. No comparison repeats a run that another one has finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from inspect import signature
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedraclora.api import asked_of, run_asked, simulate
from fedraclora.binding import OWN_GROUPS, PlainDict, section
from fedraclora.commands.compare.outcome import outcome_sentence
from fedraclora.commands.compare.table import compare_rows, refuse_others
from fedraclora.commands.run_files import Group, read_files
from fedraclora.compose.choices import groups
from fedraclora.compose.overrides import key_of
from fedraclora.compose.resume import with_changes
from fedraclora.config.build import resolved
from fedraclora.config.run_config import from_plain
from fedraclora.config.titles import method_label
from fedraclora.data.locate import user_path
from fedraclora.errors import ConfigError, DivergenceError, FedRacLoraError, unknown
from fedraclora.imports import refuse_run
from fedraclora.limits import Count, limited
from fedraclora.protocol.method import config_name
from fedraclora.run.folder import is_finished
from fedraclora.run.ledger import number
from fedraclora.run.stopped import divergence
from fedraclora.strategies.methods import METHODS
from fedraclora.terminal.progress import metric_of, size
from fedraclora.trust import is_function
from fedraclora.trust import trust as trust_all
from fedraclora.weights.files import keep_private

if TYPE_CHECKING:
    from pandas import DataFrame

OUT = "runs/compare"
NOT_IN_A_DIGEST = ("seed", "output", "resume")
UNSAFE = re.compile(r"[^\w.+-]")  # characters that a folder's name must not have
Settings = tuple[tuple[str | Mapping[str, object], ...], dict[str, object]]


@dataclass(frozen=True)
class ComparisonResult:
    """The result of a comparison.

    Attributes:
        folder: Folder of table.md, table.csv, compare.png and, with plotly, report.html.
        table: A row for each method, the best first, with plain numbers.
        runs: The run folders by row, one for each seed; `fedraclora.read_run` reads one.
        summary: A sentence with the difference of each row to the reference.
    """

    folder: Path
    table: DataFrame
    runs: Mapping[str, list[Path]]
    summary: str


@limited("")
def compare(
    *choices: str | Mapping[str, object],
    methods: str | Sequence[object] | Mapping[str, object],
    seeds: Count = 1,
    reference: str | None = None,
    metric: str | None = None,
    folder: str | Path | None = None,
    trust: Sequence[str] = (),
    **given: Any,
) -> ComparisonResult:
    """Run methods under equal conditions, and compare their metrics and traffic.

    All rows share data, model, clients, rounds and seeds. If you set no learning rate, each method
    gets its own. The same call resumes an interrupted comparison, and reads finished runs.

    Args:
        choices: As for `simulate`, for all methods.
        methods: Names of methods, or instances of their classes; or settings by the name of a row:
            a list of overrides (``["method.rank=32"]``), a mapping of keys, a mapping of the
            method's keys with its ``name``, an instance of a method's class, or None. They replace
            the settings of all methods. If the row is not named like a method, its settings must
            include ``method``.
        seeds: Number of runs of each row, with consecutive seeds from ``seed`` on.
        reference: The row to compare the others with; None for the first.
        metric: The metric to compare; None for the first one of the runs.
        folder: Output folder, like ``output.dir``; None for ``runs/compare``.
        trust: As for `simulate`.
        given: Model, data and further arguments of `simulate`, for all methods.

    Returns:
        ``table`` (a pandas frame), ``runs`` (run folders), ``summary`` (a sentence), ``folder``.

    Raises:
        ConfigError: If a row is invalid; no method is run then.
        FedRacLoraError: If rows failed, after the others were compared. A row that diverged did not
            fail: the table shows it.
    """
    refuse_run()
    trust_all(trust)
    shared, objects = common_settings(given)
    rows = {
        name: ((*choices, shared), objects, own) for name, own in settings_of_rows(methods).items()
    }
    base = next(iter(rows)) if reference is None else reference
    if base not in rows:
        raise unknown("reference", base, rows)

    found = {name: Row.of(name, *row) for name, row in rows.items()}
    out = user_path("folder", folder or next(iter(found.values())).out or OUT)
    refuse_others(out)
    failed = run_all(found, out, seeds)
    if base in failed or len(failed) == len(found):
        raise FedRacLoraError(f"{base}: {failed[base]}")
    return outcome(found, out, ComparisonSettings(seeds, base, metric), failed)


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of a comparison: the number of seeds, the reference, the metric or None."""

    seeds: int
    reference: str
    metric: str | None


@dataclass(frozen=True)
class Row:
    """A row of a comparison: a method with its settings.

    Attributes:
        name: Name of the row.
        choices, given: Arguments of `simulate`.
        plain: The composed config.
    """

    name: str
    choices: tuple[str | Mapping[str, object], ...]
    given: Mapping[str, Any]
    plain: PlainDict

    @classmethod
    def of(
        cls,
        name: str,
        choices: tuple[str | Mapping[str, object], ...],
        given: Mapping[str, Any],
        own: Settings,
    ) -> Row:
        """Compose a row, and check its values.

        Raises:
            ConfigError: If they are invalid; it names the row.
        """
        words, keys = own
        try:
            plain = asked_of((*choices, *words), {**given, **keys}).plain
            check(plain)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        return cls(name, (*choices, *words), {**given, **keys}, plain)

    @property
    def out(self) -> object:
        """The configured output folder, or None."""
        return section(self.plain, "output").get("dir")

    def folders(self, out: Path, seeds: int) -> dict[int, Path]:
        """Return the folder of each run, by seed."""
        kept = {key: value for key, value in self.plain.items() if key not in NOT_IN_A_DIGEST}
        text = json.dumps(with_changes(kept, {"data.root": None}), sort_keys=True, default=str)
        digest = sha256(text.encode()).hexdigest()[:8]
        folder = out / f"{UNSAFE.sub('_', self.name)}_{digest}"
        first = int(str(self.plain["seed"]))
        return {seed: folder / f"seed_{seed}" for seed in range(first, first + seeds)}

    def run(self, seed: int, folder: Path) -> str:
        """Run or resume one seed; return its metric, traffic and learning rate as text.

        Raises:
            FedRacLoraError: As for `simulate`.
        """
        given = {**self.given, "seed": seed}
        asked = asked_of((*self.choices, {"output": {"dir": None}}), given)
        run = run_asked(asked, folder, resume=True, brief=True)
        row, local = run.rows[-1], section(run.config, "local")
        rate, what = local.get("lr"), "rate factor" if local.get("train") else "learning rate"
        sent = (f"{way} {size(number(row, f'{way}link_total'))}" for way in ("up", "down"))
        parts = metric_of(row), *sent, "" if rate is None else f"{what} {rate}"
        return ", ".join(filter(None, parts))


def check(plain: PlainDict) -> None:
    """Check the values of a config as a run does at its start.

    A learning rate that is still to be found (``local.lr=auto``) is checked as 1.0.

    Raises:
        ConfigError: If a value is invalid; it names the key.
    """
    known = resolved(plain)
    if section(known, "local").get("lr") == "auto":
        known = with_changes(known, {"local.lr": 1.0})
    from_plain(known, METHODS)


def common_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide the arguments of all rows into settings, which a row may replace, and the rest.

    The keyword arguments of `simulate` come after its choices, and so would replace a row's own.

    Returns:
        Keys of the config; and objects, data and their options.
    """
    kept = {*signature(simulate).parameters} - {"model", *OWN_GROUPS}
    shared = {
        key: value
        for key, value in given.items()
        if key not in kept
        and (isinstance(value, str | Mapping) or key not in {"model", *OWN_GROUPS})
    }
    return shared, {key: value for key, value in given.items() if key not in shared}


def settings_of_rows(
    methods: str | Sequence[object] | Mapping[str, object],
) -> dict[str, Settings]:
    """Return the settings of each row, from the argument ``methods`` of `compare`.

    Returns:
        Choices and further arguments of `simulate`, by row.

    Raises:
        ConfigError: If a method is unknown or named twice, or there is none.
    """
    if isinstance(methods, str):
        methods = [name.strip() for name in methods.split(",")]
    if not isinstance(methods, Mapping):
        names = [own if isinstance(own, str) else label_of(own) for own in methods]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"{', '.join(twice)} is named twice; name a second row as you like, and give it "
                f"NAME:method={twice[0]} and what it differs in."
            )
        own = (None if isinstance(own, str) else own for own in methods)
        methods = dict(zip(names, own, strict=True))
    if not methods:
        raise ConfigError("no method is named; give the names of two or more.")
    return {str(name): _settings(str(name), own) for name, own in methods.items()}


def label_of(method: object) -> str:
    """Label the row of a method's instance as a run of it is labelled."""
    name = config_name(type(method)).rpartition(":")[2]
    return method_label({"method": {"name": name, **vars(method)}})


def _settings(name: str, own: object) -> Settings:
    words: tuple[str | Mapping[str, object], ...] = ()
    given: dict[str, object] = {}
    if isinstance(own, str):
        words = (own,)
    elif isinstance(own, Mapping):
        if "name" in own:  # a mapping of the method's keys, as `simulate` takes it
            own = {"method": own}
        # A config cannot hold an instance of a class.
        plain = isinstance(own.get("method"), str | Mapping | None)
        given = {} if plain else {"method": own["method"]}
        words = ({key: value for key, value in own.items() if key not in given},)
    elif isinstance(own, Sequence):
        words = tuple(own)
    elif own is not None:
        given = {"method": own}
    if not given and not any(map(_chooses, words)):
        if name not in groups()["method"] and not is_function(name):
            raise unknown("method", name, groups()["method"])
        words = (f"method={name}", *words)
    return words, given


def _chooses(settings: str | Mapping[str, object]) -> bool:
    """Check whether some settings choose a method; a mapping may set only a method's keys."""
    if isinstance(settings, str):
        return key_of(settings) == "method"
    method = settings.get("method")
    return "name" in method if isinstance(method, Mapping) else method is not None


def run_all(rows: Mapping[str, Row], out: Path, seeds: int) -> dict[str, str]:
    """Run all seeds of all rows, except finished ones; a row that fails gets no further runs.

    Returns:
        The reasons of failed rows, by name. A row that diverged did not fail.
    """
    failed, total = dict[str, str](), seeds * len(rows)
    for place, (step, row) in enumerate(product(range(seeds), rows.values()), 1):
        seed, folder = [*row.folders(out, seeds).items()][step]
        title = f"[{place} of {total}] {row.name}, seed {seed}"
        if row.name in failed:
            continue
        if is_finished(folder) or divergence(folder) is not None:
            print(f"{title}: has run, in {folder}")
            continue
        try:
            print(f"{title}: {row.run(seed, folder)}", flush=True)
        except DivergenceError as error:  # a result, not a failure
            print(f"{title}: {error}")
        except FedRacLoraError as error:
            failed[row.name] = str(error)
            print(f"{title} failed: {error}")
        except KeyboardInterrupt as error:
            error.add_note("the same command resumes the comparison")
            raise
    return failed


def outcome(
    rows: Mapping[str, Row], out: Path, settings: ComparisonSettings, failed: Mapping[str, str]
) -> ComparisonResult:
    """Write and print the comparison of the runs.

    Raises:
        FedRacLoraError: If rows failed, after the others were compared.
    """
    from pandas import DataFrame

    kept = {
        n: [*r.folders(out, settings.seeds).values()] for n, r in rows.items() if n not in failed
    }
    compared = [Group(name, [read_files(f) for f in folders]) for name, folders in kept.items()]
    table = compare_rows(compared, settings.reference, out, settings.metric)
    report = write_report(kept, out)
    table.print()
    summary = outcome_sentence(table.records, settings.reference, compared)
    print(f"written to {out}: table.md, table.csv{report}")
    print(f"figure: {out / 'compare.png'}")
    print(summary)
    if failed:
        lines = "".join(f"\n  {name}: {why}" for name, why in failed.items())
        raise FedRacLoraError(
            f"{len(failed)} of {len(rows)} rows failed and are in no table; the same command tries "
            f"them again{lines}"
        )
    return ComparisonResult(out, DataFrame(list(table.records)), kept, summary)


def write_report(folders: Mapping[str, Sequence[Path]], out: Path) -> str:
    """Write the report of all runs; return its name for the list of files, or why it is missing."""
    try:
        from fedraclora.commands.report.page import FILE, page_of, read_shown
    except ConfigError as error:  # plotly is not installed
        return f". No report: {error}"
    shown = [read_shown(folder) for row in folders.values() for folder in row]
    title = f"{', '.join(folders)}: compared"
    (out / FILE).write_text(page_of(shown, title), encoding="utf-8")
    keep_private(out / FILE)
    return f", {FILE}"
