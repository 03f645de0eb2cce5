"""How a defect of public code is planted: objects of the project are replaced in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import Parameter, isclass, signature
from typing import Any

import pytest


@dataclass
class Planting:
    """Replaces objects of the project, and remembers what stood there.

    Attributes:
        patch: Undoes it.
        replaced: Owner, name and what stood there before, of each.
    """

    patch: pytest.MonkeyPatch
    replaced: list[tuple[object, str, object]] = field(default_factory=list)

    def put(self, owner: object, name: str, new: object) -> None:
        """Replace an attribute of a class, or a name as one module knows it.

        A defect says what is done wrongly, not where: what is internal may be built otherwise.

        Raises:
            AttributeError: If the owner has no such attribute, or has it for itself alone.
            TypeError: If what is new lacks an argument: its error would hide what the defect does.
        """
        if name.startswith("_"):
            raise AttributeError(f"{name} is internal: plant the defect in what others call")
        old = getattr(owner, name)
        lacking = keywords(old) - keywords(new)
        if lacking and Parameter.VAR_KEYWORD not in kinds(new):
            raise TypeError(f"the new {name} does not take {', '.join(sorted(lacking))}")
        self.replaced.append((owner, name, old))
        self.patch.setattr(owner, name, new)

    def function(self, old: Callable[..., Any], new: Callable[..., Any]) -> None:
        """Replace a function in every module that knows it; later imports find the new one.

        Raises:
            AttributeError: If its own module does not know it by its name.
        """
        name = old.__name__
        if getattr(sys.modules[old.__module__], name) is not old:
            raise AttributeError(f"{old.__module__}.{name} is another function")
        for module in [m for n, m in sys.modules.items() if n.partition(".")[0] == "fedraclora"]:
            for known, value in list(vars(module).items()):
                if value is old:
                    self.put(module, known, new)


def kinds(thing: object) -> list[Any]:
    """List of which kinds the arguments of a function are."""
    return [each.kind for each in signature(thing).parameters.values()] if callable(thing) else []


def keywords(thing: object) -> set[str]:
    """Name what a function takes by name alone."""
    if isclass(thing) or not callable(thing):
        return set()
    found = signature(thing).parameters.values()
    return {each.name for each in found if each.kind is Parameter.KEYWORD_ONLY}


@dataclass(frozen=True)
class Defect:
    """A change of the code that must be found.

    Attributes:
        name: Of the defect.
        plant: Puts it into this process.
        methods: A pytest expression for the methods, or tests, that it concerns.
        seen: Where public code has it, or what it stands for.
        tests: Files in which it must be found; none: the suite that all methods go through.
    """

    name: str
    plant: Callable[[Planting], None]
    methods: str
    seen: str
    tests: tuple[str, ...] = ()

    @contextmanager
    def planted(self) -> Iterator[Planting]:
        """Have the defect in this process for a while."""
        with pytest.MonkeyPatch.context() as patch:
            planting = Planting(patch)
            self.plant(planting)
            yield planting


def defect(
    methods: str, seen: str, tests: tuple[str, ...] = ()
) -> Callable[[Callable[[Planting], None]], Defect]:
    """Make a defect of the function that plants it, whose name it takes; see `Defect`."""

    def made(plant: Callable[[Planting], None]) -> Defect:
        return Defect(plant.__name__, plant, methods, seen, tests)

    return made


def defects_of(module: dict[str, object]) -> tuple[Defect, ...]:
    """Give the defects among the names of a module, in the order in which they stand there."""
    return tuple(value for value in module.values() if isinstance(value, Defect))
