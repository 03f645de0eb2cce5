"""Read the configuration of a node: the clients that it serves, and its name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fedraclora.errors import ConfigError
from fedraclora.wire.fields import printable

SPAN = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?", re.ASCII)  # of a node's clients
MANY = 10**6  # most clients of a range
LONGEST_NAME = 60  # characters of the name of a node
LIST, SINGLE, NAME = "partition-ids", "partition-id", "name"


def served(node_config: Mapping[str, object]) -> list[int]:
    """Read the ids of the clients of a node.

    Raises:
        ConfigError: If its configuration does not name them.
    """
    key = LIST if LIST in node_config else SINGLE
    text = str(node_config.get(key, ""))
    found = [SPAN.fullmatch(word) for word in text.replace(",", " ").split()]
    spans = [(int(span[1]), int(span[2] or span[1])) for span in found if span is not None]
    if not spans or None in found or any(not a <= b < a + MANY for a, b in spans):
        raise ConfigError(
            f"node-config {key}={text!r:.100}: not a list of client ids. Set partition-id to "
            f"one id, or partition-ids to several, such as '0,3' or '0-124' (at most {MANY})"
        )
    return [*dict.fromkeys(client for a, b in spans for client in range(a, b + 1))]


def node_name(found: Mapping[str, object]) -> str:
    """Return the name that its owner gave a node; empty if there is none."""
    return printable(str(found.get(NAME, "")), LONGEST_NAME)
