"""``fedraclora bench``: whole rounds of every engine, of the physical limit and of the peers."""

from __future__ import annotations


def main() -> int:
    """Run the benchmark; see `experiments.bench.command`."""
    # Late: the peers' own environments import `experiments.bench.usage`, and have no Flower.
    from experiments.bench.command import main as run

    return run()
