"""Identify dataclasses by name in files and messages."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import override

from fedraclora.errors import ConfigError


class RegisteredByName:
    """Register subclasses under a name, by which files and messages identify them.

    A direct subclass begins a family; its subclasses with a ``name`` are the members. A name is
    looked up among the classes that this process has imported: reading a message never imports
    anything.

    Attributes:
        name: Its name in files and messages; empty: it cannot be in one.
        known: The members of the family by name.
    """

    name: ClassVar[str] = ""
    known: ClassVar[dict[str, type[Any]]] = {}

    @override
    def __init_subclass__(cls, **more: Any) -> None:
        """Register the class in its family; raises as `register`."""
        super().__init_subclass__(**more)
        if RegisteredByName in cls.__bases__:
            cls.known = {}
        cls.register()

    @classmethod
    def register(cls) -> None:
        """Register the class in its family, if it has a name.

        Raises:
            ConfigError: If another class has its name.
        """
        name = vars(cls).get("name", "")
        other = cls.known.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ConfigError(
                f"{cls.__module__}.{cls.__qualname__} has the name {name!r}, which is taken by "
                f"{other.__module__}.{other.__qualname__}: give it another one"
            )
        if name:
            cls.known[name] = cls

    def known_as(self) -> str:
        """Return the name by which messages identify the class.

        Raises:
            ConfigError: If its class has none of its own.
        """
        kind = type(self)
        if self.known.get(self.name) is not kind:
            raise ConfigError(
                f"{kind.__module__}.{kind.__qualname__} is to be sent in a message, but has no "
                f'name of its own there: give the class `name = "..."`'
            )
        return self.name


def of_main() -> list[type[RegisteredByName]]:
    """Return the members that the main program defines; other processes cannot import them.

    Python creates a class in another process before it sets its name, so that the process calls
    `RegisteredByName.register`.
    """
    every = (kind for family in RegisteredByName.__subclasses__() for kind in family.known.values())
    return [kind for kind in every if kind.__module__ == "__main__"]
