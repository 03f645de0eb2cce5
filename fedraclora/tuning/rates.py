"""Choose the learning rates to tune over: around the automatic rate of each method and rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedraclora.binding import PlainDict, section
from fedraclora.compose.resume import laid_over
from fedraclora.config.build import BuiltTask
from fedraclora.errors import ConfigError
from fedraclora.strategies.rate import rate_for, ruled
from fedraclora.training.localconfig import LocalConfig

RATE_KEY = "local.lr"
TIMES = f"{RATE_KEY} / rule"  # what is drawn where rates are tuned around those of the rule


@dataclass(frozen=True)
class RateRange:
    """The learning rates that are tried.

    Attributes:
        key: What is drawn, log-uniformly: the rate, or how many times that of `around` it is.
        least, greatest: Its range.
        around: Of the config of a run.
        told: What they are, in words.
    """

    key: str = TIMES
    least: float = 1 / 16
    greatest: float = 3
    around: Callable[[PlainDict], float] = lambda _: 1.0
    told: str = ""

    @classmethod
    def between(cls, least: float, greatest: float) -> RateRange:
        """The same rates for each run."""
        return cls(RATE_KEY, least, greatest, told=f"{least:.3g} to {greatest:.3g}")

    @classmethod
    def by_rule(
        cls,
        plain: PlainDict,
        built: BuiltTask,
        methods: Mapping[str, PlainDict],
        *,
        auto: bool,
        preset: bool,
    ) -> RateRange:
        """Give rates around that of the rule for each run's own method and rank.

        Args:
            plain: The config of the task.
            built: The task.
            methods: That are tried.
            auto: Whether ``local.lr`` is auto. Otherwise the rates are around the task's own for
                all, where the rule does not know one of the methods.
            preset: Whether a preset gave the task its rate: then the rule gives none, but moves it
                from the task's method and rank to the run's.

        Raises:
            ConfigError: If the rule does not know such runs, and ``local.lr`` is auto.
        """
        own = float(str(section(plain, "local")["lr"]))
        known = dict[str, tuple[float, str]]()

        def rule(config: PlainDict) -> tuple[float, str]:
            # Clipping moves the best rate too little to matter to what is tuned around it.
            config = laid_over(config, {"local.clip": None, "local.clip_by": LocalConfig.clip_by})
            key = json.dumps([config["method"], config["local"]], default=str)
            if key not in known:
                known[key] = rate_for(ruled(config), built)
            return known[key]

        text, at = f"{cls.least:.3g} to {cls.greatest:.3g} times ", ""
        try:
            here, told = rule(plain)
            for method in methods.values():
                at = f"{method['name']}: "
                rule({**plain, "method": method})
        except ConfigError as error:
            if auto:
                raise ConfigError(f"{at}{error}, or tune.lr=[LEAST, GREATEST]") from error
            why = str(error).rpartition(", but ")[2].partition(": say")[0]
            return cls(around=lambda _: own, told=f"{text}{own:g} for all; {at}{why}")
        level = 1.0
        if preset and not auto:
            level = own / here
            text += f"{own:g}, moved by the rule from {told} to a run's method and rank"
        else:
            text += f"that of the rule for a run's method and rank ({here:g} for {told})"
        return cls(around=lambda config: level * rule(config)[0], told=text)
