"""Choose the learning rates to tune over: around the automatic rate of each method and rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from fedraclora.binding import PlainDict, section
from fedraclora.compose.resume import with_changes
from fedraclora.config.build import PreparedTask
from fedraclora.config.run_config import from_plain
from fedraclora.config.titles import method_label
from fedraclora.errors import ConfigError
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.rate import rule_rate
from fedraclora.strategies.rate_search import find_rate
from fedraclora.training.localconfig import AUTO, LocalConfig

RATE_KEY = "local.lr"
TIMES = f"{RATE_KEY} / rule"  # what is drawn where rates are tuned around those of the rule


@dataclass(frozen=True)
class RateRange:
    """Hold the learning rates to try.

    Attributes:
        key: The tuned key, log-uniform: the rate itself, or its ratio to `around`.
        least, greatest: Its range.
        around: Computes the reference rate of a run's config.
        description: The rates in words.
    """

    key: str = TIMES
    least: float = 1 / 16
    greatest: float = 3
    around: Callable[[PlainDict], float] = lambda _: 1.0
    description: str = ""

    @classmethod
    def between(cls, least: float, greatest: float) -> RateRange:
        """Return the same range for each run."""
        return cls(RATE_KEY, least, greatest, description=f"{least:.3g} to {greatest:.3g}")

    @classmethod
    def for_task(
        cls,
        plain: PlainDict,
        built: PreparedTask,
        methods: Mapping[str, PlainDict],
        *,
        auto: bool,
    ) -> RateRange:
        """Return rates around that of each run's own method and rank.

        Args:
            plain: The config of the task.
            built: The task.
            methods: The methods to try.
            auto: Whether ``local.lr`` is auto. If so, the reference is the rule's rate, or the one
                that a search finds if the rule does not cover the run. If not, it is the task's own
                rate, which the rule converts from the task's method and rank to the run's if it
                covers all of them.
        """
        known = dict[str, float | None]()

        def rule(config: PlainDict) -> float | None:
            # Clipping moves the best rate too little to matter to what is tuned around it.
            unclipped: dict[str, object] = {
                "local.clip": None,
                "local.clip_by": LocalConfig.clip_by,
                RATE_KEY: AUTO,
            }
            config = with_changes(config, unclipped)
            key = json.dumps([config["method"], config["local"]], default=str)
            if key not in known:
                with suppress(ConfigError):  # what cannot be run is left out when it is tried
                    run = RunBuilder(from_plain(config, METHODS))
                    known[key] = rule_rate(run.config, built)
                    if known[key] is None and auto:
                        known[key] = find_rate(run).rate
            return known.get(key)

        text = f"{cls.least:.3g} to {cls.greatest:.3g} times "
        here = rule(plain)
        if auto:
            text += "that of a run's method and rank"
            text += f" ({here:g} for {method_label(plain)})" if here else ""
            return cls(around=lambda config: rule(config) or 1.0, description=text)
        own = float(str(section(plain, "local")["lr"]))
        unknown = [n for n, method in methods.items() if rule({**plain, "method": method}) is None]
        if here is None or unknown:
            why = f"there is no rule for {unknown[0] if unknown else method_label(plain)}"
            return cls(around=lambda _: own, description=f"{text}{own:g} for all: {why}")
        level, label = own / here, method_label(plain)
        text += f"{own:g}, moved by the rule from {label} to a run's method and rank"
        return cls(around=lambda config: level * (rule(config) or here), description=text)
