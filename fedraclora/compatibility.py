"""Check that the features of a run are compatible, as each feature declares.

A feature is something that a run may have: a setting, a step of its rounds, a trait of its method,
or a part of its messages. Declare it where it is defined:

    @Feature("a log of updates", instead="steps without it", avoids={"secure=secagg": "..."})
    class LogUpdates(RoundStep): ...

On a class, each object of it has the feature. On a method of a class, an object has it if that
method returns a true value; a text is shown as the value. A method with an argument is called with
the message to the clients (`RoundInstructions`), once that is known. A function that a config names
(a data set, a partition, a model) declares features in the same way, or with `Feature.where` for
some of its settings. Names of features that exist are in `KNOWN`; docs/compatibility.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import Any, TypeAlias, TypeVar

from fedraclora.errors import ConfigError, unknown

Part = TypeVar("Part", bound=Callable[..., Any])
Found = bool | str
MARK = "declared_features"
KNOWN: dict[str, Feature] = {}
PLACES: dict[str, str] = {}  # the module that declares a feature, by its name


@dataclass(frozen=True, eq=False)
class Feature:
    """A feature of a run, and the features it is incompatible with.

    Attributes:
        name: In messages, and in what other features avoid and require.
        instead: What to take to be without it.
        take: What to take to have it, where another feature requires it; empty: its name says so.
        avoids: Names of features that it does not go with, and why.
        requires: Names of features that it needs, and why.
        reads: Paths of keys that have no effect without it.
        each_round: Whether a round may have it that others have not: then it is looked for again
            whenever something is sent.
    """

    name: str
    instead: str = "another method"
    take: str = ""
    avoids: Mapping[str, str] = field(default_factory=dict)
    requires: Mapping[str, str] = field(default_factory=dict)
    reads: Collection[str] = ()
    each_round: bool = False

    def __post_init__(self) -> None:
        """Make the name known."""
        KNOWN[self.name] = self
        _relations.cache_clear()

    def __call__(self, part: Part) -> Part:
        """Declare it of a class, or of the objects for which a method returns something true."""
        setattr(part, MARK, (*vars(part).get(MARK, ()), self))
        PLACES.setdefault(self.name, part.__module__)
        return part

    def where(self, holds: Callable[[Mapping[str, Any]], Found]) -> Callable[[Part], Part]:
        """Declare it of a function that a config names, for some of its settings.

        Args:
            holds: Tells from the settings whether a run with them has the feature.
        """

        def declare(part: Part) -> Part:
            PLACES.setdefault(self.name, part.__module__)
            setattr(part, MARK, (*vars(part).get(MARK, ()), Declared(self, holds=holds)))
            return part

        return declare


@dataclass(frozen=True)
class Choice:
    """A function that a config names, as a part of the run.

    Attributes:
        function: The function.
        settings: Its arguments, with the defaults of those that the config does not set.
    """

    function: Callable[..., Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Declared:
    """A feature of a class or a function.

    Attributes:
        feature: What it is.
        method: Says of an object whether it has the feature; empty: each one has.
        by_sent: Whether that method is asked with what is sent.
        holds: Of a function: tells from its settings; None: it has the feature whatever they are.
    """

    feature: Feature
    method: str = ""
    by_sent: bool = False
    holds: Callable[[Mapping[str, Any]], Found] | None = None

    def found(self, part: object, sent: object) -> Found:
        """Return whether an object has the feature, or the value that it has."""
        if isinstance(part, Choice):  # of a class of the user's there is no object yet
            return not self.method and (self.holds is None or self.holds(part.settings))
        if not self.method:
            return True
        given = (sent,) if self.by_sent else ()
        return getattr(part, self.method)(*given)  # type: ignore[no-any-return]


def declared_by(kind: Callable[..., Any]) -> tuple[Declared, ...]:
    """List the features that a class and its bases, or a function, declare."""
    if kind in DECLARED:  # asked in each round
        return DECLARED[kind]
    if not isinstance(kind, type):
        marks = vars(kind).get(MARK, ())
        return tuple(each if isinstance(each, Declared) else Declared(each) for each in marks)
    found = dict[tuple[str, str], Declared]()
    for each in reversed(kind.__mro__):
        for feature in vars(each).get(MARK, ()):
            found[feature.name, ""] = Declared(feature)
        for name, value in vars(each).items():
            for feature in () if isinstance(value, type) else getattr(value, MARK, ()):
                by_sent = len(signature(value).parameters) > 1
                found[feature.name, name] = Declared(feature, name, by_sent)
    return DECLARED.setdefault(kind, tuple(found.values()))


def compatibility_note(kind: Callable[..., Any]) -> str:
    """Say what a class or a function does not go with, and what it needs; empty: nothing."""
    features = [x.feature for x in declared_by(kind) if not x.method and x.holds is None]
    avoids = [name for feature in features for name in feature.avoids]
    needs = [name for feature in features for name in feature.requires]
    lists = (("Does not go with", avoids), ("Needs", needs))
    return " ".join(f"{what}: {'; '.join(names)}." for what, names in lists if names)


DECLARED: dict[Callable[..., Any], tuple[Declared, ...]] = {}


class Features:
    """The features of a run, each looked for when it is first wanted.

    Args:
        parts: Whatever may declare some; others are passed over.
        sent: What is sent to clients; None: it is not known yet, nor whether something is missing.
        known: What was found before, by name.
        complete: Whether these are all parts, so that others are missing; None: with ``sent``.
    """

    def __init__(
        self,
        parts: Iterable[object],
        sent: object = None,
        known: Mapping[str, Found] | None = None,
        *,
        complete: bool | None = None,
    ) -> None:
        self.sent, self.complete = sent, sent is not None if complete is None else complete
        self.declared: dict[str, tuple[tuple[Declared, object], ...]] = {}
        self.known = dict(known or {})
        self._add(parts)

    def _add(self, parts: Iterable[object]) -> None:
        for part in parts:
            for each in declared_by(part.function if isinstance(part, Choice) else type(part)):
                if self.sent is not None or not each.by_sent:
                    name = each.feature.name
                    self.declared[name] = (*self.declared.get(name, ()), (each, part))

    def at(self, sent: object, *parts: object) -> Features:
        """Return the features at a later message of the same run.

        Args:
            sent: The message to the clients.
            parts: Parts of this message alone.
        """
        later = Features((), sent, self.lasting)
        later.declared = dict(self.declared)
        later._add(parts)
        return later

    def has(self, name: str) -> Found:
        """Return whether the run has a feature, or the value that it has."""
        if name not in self.known:
            declared = self.declared.get(name, ())
            found = (each.found(part, self.sent) for each, part in declared)
            self.known[name] = next((value for value in found if value), False)
        return self.known[name]

    @property
    def lasting(self) -> dict[str, Found]:
        """Return what was found and holds in all rounds."""
        return {name: found for name, found in self.known.items() if not KNOWN[name].each_round}

    def idle(self, values: Mapping[str, tuple[object, object]]) -> dict[str, str]:
        """Find settings that have no effect, since the feature that reads them is missing.

        Args:
            values: The value and the default of each key, by its path.

        Returns:
            A sentence for each such key.
        """
        found = dict[str, str]()
        for reader in [pairs[0][0].feature for pairs in self.declared.values()]:
            for key in reader.reads:
                value, default = values.get(key, (None, None))
                if value != default and not self.has(reader.name):
                    known = "null" if default is None else default
                    found[key] = (
                        f"{key}={value} has no effect here: it is for "
                        f"{reader.take or reader.name}. Leave it at {known}."
                    )
        return found

    def conflicts(self, *, each_round: bool = False) -> Iterator[str]:
        """Yield a sentence for each pair that does not go together, and for each that is missing.

        Args:
            each_round: Whether to look only at pairs that may change from round to round.

        Raises:
            ConfigError: If a feature avoids or requires what is no feature.
        """
        declared = (each.feature for pairs in self.declared.values() for each, _ in pairs)
        features = tuple(dict.fromkeys(declared))
        for what, avoided, required in _relations(
            features, each_round=each_round, complete=self.complete
        ):
            for beside, why in avoided:
                if (one := self.has(what.name)) and (other := self.has(beside.name)):
                    yield _conflict(what, beside, why, one, other)
            for beside, why in required:
                if not self.complete and beside.name not in self.declared:
                    continue  # who has it comes later
                if self.has(what.name) and not self.has(beside.name):
                    take = beside.take or beside.name
                    yield f"{what.name} needs {beside.name}: {why}. Take {take}, or {what.instead}"


Related: TypeAlias = list[tuple[Feature, str]]
Relations: TypeAlias = list[tuple[Feature, Related, Related]]


@cache  # asked in each round
def _relations(features: tuple[Feature, ...], *, each_round: bool, complete: bool) -> Relations:
    """List the features that avoid or require others, each with these; see `_related`."""
    pairs = ((what, *_related(what, each_round=each_round, complete=complete)) for what in features)
    return [each for each in pairs if each[1] or each[2]]


def _related(what: Feature, *, each_round: bool, complete: bool) -> tuple[Related, Related]:
    """List the features that one avoids, and those that it requires, and why.

    Args:
        what: The feature.
        each_round: Whether to list only those that may change from round to round.
        complete: Whether all modules of the run are imported.

    Raises:
        ConfigError: If there is none of a name, and the run is complete; it names the nearest.
    """
    found: tuple[Related, Related] = ([], [])
    for named, pairs in zip(found, (what.avoids, what.requires), strict=True):
        for name, why in pairs.items():
            if name not in KNOWN and not complete:
                continue  # the module that declares it is not imported yet
            if name not in KNOWN:
                raise unknown(f"feature beside {what.name}", name, KNOWN)
            if not each_round or what.each_round or KNOWN[name].each_round:
                named.append((KNOWN[name], why))
    return found


def _conflict(what: Feature, beside: Feature, why: str, *found: Found) -> str:
    met = ", ".join(value for value in found if isinstance(value, str))
    return (
        f"{what.name} does not go with {beside.name}{met and f' ({met})'}: {why}. Take "
        f"{beside.instead}, or {what.instead}"
    )


def refuse(conflicts: Iterable[str]) -> None:
    """Reject a run with incompatible features.

    Raises:
        ConfigError: With all that does not, a line each.
    """
    if found := [*dict.fromkeys(conflicts)]:
        raise ConfigError("\n  ".join(found))


def conflict(kind: type, beside: Feature, *found: Found) -> ConfigError:
    """Build the error for a feature that a part comes upon while it computes.

    Args:
        kind: The class of the part, which declares that it avoids the feature.
        beside: The feature.
        found: Values that were met.
    """
    declared = (each.feature for each in declared_by(kind))
    what = next(feature for feature in declared if beside.name in feature.avoids)
    return ConfigError(_conflict(what, beside, what.avoids[beside.name], *found))
