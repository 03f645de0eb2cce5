"""Tell the server that the owner of a node's data refuses a message, and of which node."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from typing_extensions import override

from fedraclora.engines.node_config import LIST, NAME, SINGLE, node_name, served
from fedraclora.errors import ConfigError
from fedraclora.wire.fields import printable


@dataclass(frozen=True)
class OwnerRefusal:
    """Why an owner refuses, in a reply without content.

    Attributes:
        why: The reason, a part of a sentence.
        until: When it may end by itself; empty: when the owner decides so.
        name: The name of the node; empty if it has none.
        clients: The clients that the node has.
    """

    why: str
    until: str = ""
    name: str = ""
    clients: tuple[int, ...] = ()

    def write(self, node_config: Mapping[str, object]) -> str:
        """Write it as the reason of an error reply, with facts of the node's configuration."""
        known = {key: node_config[key] for key in (LIST, SINGLE, NAME) if key in node_config}
        return json.dumps({"why": self.why, "until": self.until, **known})

    @classmethod
    def read(cls, text: str) -> OwnerRefusal:
        """Read the reason of an error reply, which may be any text."""
        try:
            found = json.loads(text)
            why, until = (printable(str(found[key])) for key in ("why", "until"))
            name = node_name(found)
        except (LookupError, TypeError, ValueError, AttributeError):
            return cls(printable(text))
        try:
            clients = served(found)
        except ConfigError:
            clients = []
        return cls(why, until, name, (*clients,))

    @override
    def __str__(self) -> str:
        """Return the reason, and until when it holds."""
        return f"{self.why}{f', until {self.until}' if self.until else ''}"
