"""What a tuning tries: the settings of ``conf/tune.yaml``, and the space of a task."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from fedraclora.binding import PlainDict, build, section
from fedraclora.config.settings import WireConfig
from fedraclora.errors import ConfigError, unknown
from fedraclora.experiments import CONF
from fedraclora.experiments.choices import choice
from fedraclora.experiments.resume import laid_over
from fedraclora.limits import Chance, Count, Inner, Limit, Limited, Positive, hints
from fedraclora.objects import is_named
from fedraclora.strategies import METHODS
from fedraclora.weights.files import flatten

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

LR = "local.lr"
KEYS = {
    "lr": LR,
    "rank": "method.rank",
    "links": "method.resample_every",
    "uplink": "wire.uplink",
    "downlink": "wire.downlink",
}
WIDE = (1 / 32, 8)  # times the task's own learning rate
SET_BY_TUNE = ("evaluate.split", "seed", "resume")


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Limited, group="tune"):
    """What ``conf/tune.yaml`` says; there stand the defaults, and what each key means."""

    runs: Count | None
    core_hours: Positive | None
    megabytes: Positive | None
    method: list[str]
    lr: list[float] | None
    rank: list[int]
    uplink: list[str] | None
    downlink: list[str] | None
    links: list[int]
    more: Mapping[str, list[object]]
    first: list[dict[str, object]]
    never: list[list[str]]
    metric: str | None
    validation: Inner
    seeds: list[int]
    test_seeds: list[int]
    rungs: list[float]
    keep: Chance
    sizes: list[float]

    @override
    def __post_init__(self) -> None:
        """Reject what no tuning can be made of."""
        super().__post_init__()
        if (self.runs, self.core_hours, self.megabytes) == (None, None, None):
            raise ConfigError(
                "tune.runs, tune.core_hours and tune.megabytes are null, so that it would never "
                "end: set one of them"
            )
        if self.lr is not None and not (len(self.lr) == 2 and 0 < self.lr[0] < self.lr[1]):
            raise ConfigError(f"tune.lr is {self.lr}; [least, greatest] above 0 is wanted")
        for key in ("method", "rank", "uplink", "downlink", "links", "seeds", "sizes"):
            if getattr(self, key) == []:
                raise ConfigError(f"tune.{key} is []; a list of what to try is wanted")
        for key in ("rank", "links", "sizes", "rungs"):
            if wrong := [x for x in getattr(self, key) if x <= 0 or (key == "rungs" and x >= 1)]:
                within = " below 1" if key == "rungs" else ""
                raise ConfigError(f"tune.{key} has {wrong[0]}; numbers above 0{within} are wanted")
        if both := sorted({*self.seeds} & {*self.test_seeds}):
            raise ConfigError(
                f"tune.seeds and tune.test_seeds have both {both[0]}: the winner is tested on "
                "seeds that were not tuned on"
            )


def settings(words: Sequence[str], given: Mapping[str, object]) -> TuneConfig:
    """Read the settings of a tuning.

    Args:
        words: ``tune.KEY=VALUE``.
        given: Keys said in Python, which win.

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
    config: TuneConfig = build("tune", TuneConfig, {str(k): v for k, v in dict(plain).items()})  # type: ignore[arg-type]
    return config


@dataclass(frozen=True)
class Space:
    """The settings of a task that can be tried.

    Attributes:
        plain: The config of the task.
        methods: By name, with their keys; those that the user said hold for each that has them.
        tuned: The keys that are tuned, and their values.
        rates: The least and the greatest learning rate; None: it is not tuned.
    """

    plain: PlainDict
    methods: Mapping[str, PlainDict]
    tuned: Mapping[str, list[Any]]
    rates: tuple[float, float] | None

    @classmethod
    def of(
        cls, plain: PlainDict, said: Collection[str], config: TuneConfig, asked: Collection[str]
    ) -> Space:
        """Take what is to be tuned from the settings, but for keys that the user said.

        Args:
            plain: The config of the task.
            said: Keys of it that the user said.
            config: The settings of the tuning.
            asked: Keys of it that the user said.

        Raises:
            ConfigError: If a key is said twice, or a value is none of those that there are.
        """
        names = {**KEYS, "method": "method", **{key: key for key in config.more}}
        if twice := [key for key in names if names[key] in said and key in asked]:
            raise ConfigError(
                f"tune.{twice[0]} and {names[twice[0]]} are both said: leave one of them out"
            )
        if wrong := [key for key in SET_BY_TUNE if key in said]:
            raise ConfigError(
                f"{wrong[0]} is set by tune (tune.seeds, tune.validation): leave it out"
            )
        tuned = {k: [*dict.fromkeys(v)] for k, v in _values(plain, config).items() if k not in said}
        own, flat = section(plain, "method"), flatten(plain)
        for key in config.more:
            if key not in flat and not key.startswith("method."):
                raise unknown("key in tune.more", key, flat)
        for name in config.method:
            if name not in METHODS:
                raise unknown("method in tune.method", name, METHODS)
        fixed = {
            k.partition(".")[2]: flat[k] for k in said if k.startswith("method.") and k in flat
        }
        listed = [str(own["name"])] if "method" in said else [*dict.fromkeys(config.method)]
        methods = {n: own if n == own["name"] else _method(n, fixed) for n in listed}
        rates, local = None, section(plain, "local")
        if LR not in said and local.get("train") is None and not is_named(local.get("name")):
            lr = float(str(local["lr"]))
            low, high = config.lr or (lr * WIDE[0], lr * WIDE[1])
            rates = float(low), float(high)
        return cls(plain, methods, tuned, rates)

    def suggest(self, trial: BaseTrial) -> PlainDict:
        """Let a trial choose its settings; give the config that they make of the task's."""
        name = trial.suggest_categorical("method", [*self.methods])
        method = dict(self.methods[str(name)])
        config = {**self.plain, "method": method}
        for key, values in self.tuned.items():
            leaf = key.removeprefix("method.")
            # Null means for ever, or never: such a method has no links, say.
            if leaf == key or method.get(leaf) is not None:
                config = laid_over(config, {key: trial.suggest_categorical(key, values)})
        if self.rates is not None:
            config = laid_over(config, {LR: trial.suggest_float(LR, *self.rates, log=True)})
        return config

    def first(self, listed: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
        """List the settings to begin with that lie in this space, at the task's learning rate."""
        found = []
        known = {**self.tuned, "method": [*self.methods]}
        for given in listed:
            names = {KEYS.get(key, key): value for key, value in given.items()}
            own = {key: value for key, value in names.items() if key in known}
            if all(value in known[key] for key, value in own.items()):
                lr = float(str(section(self.plain, "local").get("lr")))
                near = self.rates is not None and self.rates[0] <= lr <= self.rates[1]
                own |= {LR: lr} if near else {}
                found += [own] if own and own not in found else []
        return found

    def told(self) -> dict[str, str]:
        """Say what is tried, by key."""
        found = {"method": ", ".join(self.methods)}
        if self.rates is not None:
            found[LR] = f"{self.rates[0]:.3g} to {self.rates[1]:.3g}, log-uniform"
        return found | {key: ", ".join(map(str, values)) for key, values in self.tuned.items()}


def _values(plain: PlainDict, config: TuneConfig) -> dict[str, list[Any]]:
    """List the values of each key that may be tuned."""
    marks = get_args(hints(WireConfig)["uplink"])  # has all kinds of numbers that there are
    kinds = next([*mark.choices] for mark in marks if isinstance(mark, Limit))
    rounds, never = int(str(plain["rounds"])), {tuple(words) for words in config.never}
    found: dict[str, list[Any]] = {KEYS["rank"]: config.rank, **config.more}
    found[KEYS["links"]] = [k for k in config.links if k <= rounds] or [1]
    for way, listed in (("uplink", config.uplink), ("downlink", config.downlink)):
        if wrong := [kind for kind in listed or () if kind not in kinds]:
            raise unknown(f"kind of numbers in tune.{way}", wrong[0], kinds)
        found[f"wire.{way}"] = listed or kinds
    found = {k: [v for v in vs if (f"{k}={v}",) not in never] for k, vs in found.items()}
    if empty := [key for key, values in found.items() if not values]:
        raise ConfigError(f"tune.never leaves nothing of {empty[0]} to try: name another value")
    return found


def _method(name: str, fixed: Mapping[str, object]) -> PlainDict:
    node = {"name": name, **choice("method", name)}
    return node | {key: value for key, value in fixed.items() if key in node}
