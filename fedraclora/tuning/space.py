"""The search space of a tuning: the settings of ``conf/tune.yaml``, applied to a task."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from fedraclora.binding import PlainDict, build, section
from fedraclora.compose import CONF
from fedraclora.compose.choices import choice
from fedraclora.compose.resume import with_changes
from fedraclora.config.build import PreparedTask
from fedraclora.errors import ConfigError, unknown
from fedraclora.limits import Chance, Count, Inner, Limit, Limited, OneOf, Positive, Whole
from fedraclora.object_registry import is_named
from fedraclora.protocol.quantized import FULL, ROUNDED
from fedraclora.strategies.methods import METHODS
from fedraclora.tuning.rates import RATE_KEY, TIMES, RateRange
from fedraclora.weights.files import flatten

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

KEYS = {
    "lr": RATE_KEY,
    "rank": "method.rank",
    "links": "method.merge_every",
    "uplink": "compression.uplink",
    "downlink": "compression.downlink",
}
SET_BY_TUNE = ("evaluate.split", "seed", "resume")
SOME = Limit("a list of one or more", lambda values: values != [])
UP_TO_FOUR = Limit("a list of one to four", lambda values: 1 <= len(values) <= 4)
RISING = Limit("[least, greatest]", lambda lr: lr is None or (len(lr) == 2 and lr[0] < lr[1]))
Kinds = Annotated[list[Annotated[str, OneOf((FULL, *ROUNDED))]] | None, SOME]


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Limited, group="tune"):
    """Hold the settings of ``conf/tune.yaml``, which has the defaults and describes each key."""

    runs: Count | None
    core_hours: Positive | None
    megabytes: Positive | None
    method: Annotated[list[Annotated[str, OneOf((*METHODS,))]], SOME]
    lr: Annotated[list[Positive] | None, RISING]
    rank: Annotated[list[Count], SOME]
    uplink: Kinds
    downlink: Kinds
    links: Annotated[list[Count], SOME]
    more: Mapping[str, list[object]]
    first: list[dict[str, object]]
    never: list[list[str]]
    metric: str | None
    validation: Inner
    seeds: Annotated[list[Whole], SOME]
    test_seeds: Annotated[list[Whole], SOME]
    rungs: list[Inner]
    keep: Chance
    sizes: Annotated[list[Positive], UP_TO_FOUR]

    @override
    def __post_init__(self) -> None:
        """Reject settings that leave nothing to tune."""
        super().__post_init__()
        if (self.runs, self.core_hours, self.megabytes) == (None, None, None):
            raise ConfigError(
                "tune.runs, tune.core_hours and tune.megabytes are null, so tuning would never "
                "end: set one of them"
            )
        if both := sorted({*self.seeds} & {*self.test_seeds}):
            raise ConfigError(
                f"tune.seeds and tune.test_seeds both have {both[0]}: use other seeds for the test"
            )


def settings(words: Sequence[str], given: Mapping[str, object]) -> TuneConfig:
    """Read the settings of a tuning.

    Args:
        words: ``tune.KEY=VALUE``.
        given: Keys set in Python, which win.

    Raises:
        ConfigError: If a key or a value is wrong.
    """
    try:
        said = OmegaConf.from_dotlist([word.removeprefix("tune.") for word in words])
        whole = OmegaConf.merge(OmegaConf.load(CONF / "tune.yaml"), said, dict(given))
        plain = OmegaConf.to_container(whole, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"{' '.join(words)} cannot be read as tune.KEY=VALUE: {told}") from error
    return build("tune", TuneConfig, {str(k): v for k, v in dict(plain).items()})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Space:
    """Hold the settings of a task that can be tried.

    Attributes:
        plain: The config of the task.
        methods: By name, with their keys; keys that the user set apply to each method with them.
        tuned: The tuned keys, and their values.
        rates: The learning rates; None: they are not tuned.
    """

    plain: PlainDict
    methods: Mapping[str, PlainDict]
    tuned: Mapping[str, list[Any]]
    rates: RateRange | None

    @classmethod
    def of(
        cls, plain: PlainDict, typed: Collection[str], config: TuneConfig, asked: Collection[str]
    ) -> Space:
        """Build the search space from the settings, without keys that the user set.

        Args:
            plain: The config of the task.
            typed: Keys of it that the user set.
            config: The settings of the tuning.
            asked: Keys of it that the user set.

        Raises:
            ConfigError: If a key is set twice, or a value is invalid.
        """
        names = {**KEYS, "method": "method", **{key: key for key in config.more}}
        if twice := [key for key in names if names[key] in typed and key in asked]:
            raise ConfigError(
                f"tune.{twice[0]} and {names[twice[0]]} are both given: leave one out"
            )
        if wrong := [key for key in SET_BY_TUNE if key in typed]:
            raise ConfigError(f"{wrong[0]} is set by tune (conf/tune.yaml): leave it out")
        own, flat, local = section(plain, "method"), flatten(plain), section(plain, "local")
        for key in config.more:
            if key not in flat and not key.startswith("method."):
                raise unknown("key in tune.more", key, flat)
        tuned = {key: values for key, values in _values(plain, config).items() if key not in typed}
        fixed = {k[7:]: flat[k] for k in typed if k.startswith("method.") and k in flat}
        listed = [str(own["name"])] if "method" in typed else [*dict.fromkeys(config.method)]
        methods = {n: own if n == own["name"] else _method(n, fixed) for n in listed}
        free = (
            RATE_KEY not in typed and local.get("train") is None and not is_named(local.get("name"))
        )
        rates = (RateRange.between(*config.lr) if config.lr else RateRange()) if free else None
        return cls(plain, methods, tuned, rates)

    def of_task(self, plain: PlainDict, built: PreparedTask, *, auto: bool) -> Space:
        """Return the space for the whole config of a task, with rates by `RateRange.for_task`."""
        rates = self.rates
        if rates and rates.key == TIMES:
            rates = RateRange.for_task(plain, built, self.methods, auto=auto)
        return replace(self, plain=plain, rates=rates)

    def suggest(self, trial: BaseTrial) -> PlainDict:
        """Let a trial draw its settings; return their config, not yet `rated`."""
        name = trial.suggest_categorical("method", [*self.methods])
        method = dict(self.methods[str(name)])
        config = {**self.plain, "method": method}
        for key, values in self.tuned.items():
            leaf = key.removeprefix("method.")
            # Null means for ever, or never: such a method has no links, say.
            if leaf == key or method.get(leaf) is not None:
                config = with_changes(config, {key: trial.suggest_categorical(key, values)})
        if self.rates is not None:
            least, greatest = self.rates.least, self.rates.greatest
            drawn = trial.suggest_float(self.rates.key, least, greatest, log=True)
            config = with_changes(config, {RATE_KEY: drawn})
        return config

    def rated(self, config: PlainDict) -> PlainDict:
        """Write the learning rate into a config that has drawn one."""
        if self.rates is None:
            return config
        rate = float(str(section(config, "local")["lr"])) * self.rates.around(config)
        return with_changes(config, {RATE_KEY: float(f"{rate:.4g}")})

    def values(self, params: Mapping[str, object], config: PlainDict) -> dict[str, object]:
        """List the drawn values by key, with the resulting learning rate."""
        rate = {RATE_KEY: section(config, "local")["lr"]} if self.rates else {}
        return {key: value for key, value in params.items() if key != TIMES} | rate

    def first(self, listed: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
        """List the initial settings that lie in this space, at the rule's rates."""
        known = {**self.tuned, "method": [*self.methods]}
        near = {TIMES: 1.0} if self.rates and self.rates.key == TIMES else {}
        found: list[dict[str, Any]] = []
        for given in listed:
            own = {KEYS.get(k, k): v for k, v in given.items() if KEYS.get(k, k) in known} | near
            if own not in found and all(own[key] in known[key] for key in own.keys() - {TIMES}):
                found.append(own)
        return found

    def lower(self, params: Mapping[str, object]) -> dict[str, object]:
        """Return drawn values with a quarter of their rate; None outside of the space."""
        if self.rates is None or self.rates.key not in params:
            return {}
        rate = float(str(params[self.rates.key])) / 4
        return {**params, self.rates.key: rate} if rate >= self.rates.least else {}

    def description(self) -> dict[str, str]:
        """Describe the space by key."""
        rates = self.rates and {RATE_KEY: f"{self.rates.description}, log-uniform"}
        values = {key: ", ".join(map(str, values)) for key, values in self.tuned.items()}
        return {"method": ", ".join(self.methods)} | (rates or {}) | values


def _values(plain: PlainDict, config: TuneConfig) -> dict[str, list[Any]]:
    """List the values of each key that may be tuned."""
    rounds, never = int(str(plain["rounds"])), {tuple(words) for words in config.never}
    found: dict[str, list[Any]] = {
        KEYS["rank"]: config.rank,
        **config.more,
        KEYS["links"]: [k for k in config.links if k <= rounds] or [1],
        KEYS["uplink"]: config.uplink or [FULL, *ROUNDED],
        KEYS["downlink"]: config.downlink or [FULL, *ROUNDED],
    }
    found = {
        key: [value for value in dict.fromkeys(values) if (f"{key}={value}",) not in never]
        for key, values in found.items()
    }
    if empty := [key for key, values in found.items() if not values]:
        raise ConfigError(f"tune.never excludes every value of {empty[0]}: name another value")
    return found


def _method(name: str, fixed: Mapping[str, object]) -> PlainDict:
    node = {"name": name, **choice("method", name)}
    return node | {key: value for key, value in fixed.items() if key in node}
