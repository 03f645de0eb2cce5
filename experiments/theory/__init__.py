"""``fedraclora theory``: measured curves of convex problems beside the bounds on them."""

from __future__ import annotations


def main() -> int:
    """Run it; see `experiments.theory.command`."""
    # Late, so that a worker process that unpickles a case does not import the figures.
    from experiments.theory.command import main as run

    return run()
