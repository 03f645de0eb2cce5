"""The chain of links, merged one after another."""

from __future__ import annotations

from fedraclora.protocol.link import Link, Plan, apply_link
from fedraclora.tree import Tree


def replay(base: Tree, links: list[Link], plan: Plan) -> Tree:
    """Rebuild the weights after the given links: W_t from W_0."""
    for link in links:
        base = apply_link(base, link, plan)
    return base
