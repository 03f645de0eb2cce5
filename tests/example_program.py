"""A client program of no method, for tests of what all programs have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedraclora.limits import Count
from fedraclora.protocol.program import ClientProgram


@dataclass(frozen=True)
class Example(ClientProgram, group="method"):
    """Fields of every kind that a message holds."""

    name = "example"
    fixes = True

    blocks: Count
    seeds: dict[str, int] = field(default_factory=dict)
    turned: tuple[str, ...] = ()
