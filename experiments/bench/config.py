"""What to time: the ``key=value`` words of ``fedraclora bench``."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.config.schema import build
from fedraclora.errors import unknown
from fedraclora.experiments.bench.workloads import WORKLOADS
from fedraclora.experiments.words import key_values
from fedraclora.limits import Count, Limited

ROWS = tuple(dict.fromkeys(row for workload in WORKLOADS.values() for row in workload.rows))


@dataclass(frozen=True)
class BenchConfig(Limited):
    """What to time.

    Attributes:
        device: ``auto``, ``cpu`` or ``cuda``.
        size: A workload, several joined by commas, or ``all``.
        rows: Names of rows joined by commas, or ``all``.
        rounds: Counted rounds of each row; null: as the workload says.
        threads: Of torch, in each process.
        out: A folder; each workload writes one JSON file there.
        peers: The folder with one virtual environment per peer (``make bench-peers``).
        check: Fail when a ratio leaves its bound.
        profile: Say where the time of a round goes, instead.
        table: Print the tables of a folder of JSON files, instead.
    """

    device: str = "auto"
    size: str = "all"
    rows: str = "all"
    rounds: Count | None = None
    threads: Count = 1
    out: str | None = None
    peers: str = ".venv-peers"
    check: bool = False
    profile: bool = False
    table: str | None = None

    @override
    def __post_init__(self) -> None:
        """Reject impossible settings."""
        super().__post_init__()
        for size in self.sizes:
            if size not in WORKLOADS:
                raise unknown("size", size, [*WORKLOADS, "all"])
        for row in () if self.rows == "all" else self.rows.split(","):
            if row not in ROWS:
                raise unknown("rows", row, [*ROWS, "all"])

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the chosen workloads."""
        return tuple(WORKLOADS) if self.size == "all" else tuple(self.size.split(","))

    @property
    def words(self) -> list[str]:
        """The words that `parse` reads this from."""
        return [f"{key}={value}" for key, value in vars(self).items() if value is not None]

    def wants(self, row: str) -> bool:
        """Return whether a row is asked for."""
        return self.rows == "all" or row in self.rows.split(",")


def parse(words: list[str]) -> BenchConfig:
    """Read ``key=value`` words.

    Raises:
        ConfigError: If a word or a value is wrong, naming it.
    """
    return build("bench", BenchConfig, key_values(words))
