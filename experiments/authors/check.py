"""What a check is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedraclora.experiments.authors.code import Repository

Findings = Mapping[str, float]


@dataclass(frozen=True)
class CodeCheck:
    """Hold one method to one repository.

    Attributes:
        method: Of ``conf/method``.
        repository: ``OWNER/NAME``.
        commit: Of it.
        compared: What both compute: "the server's step, 3 rounds".
        run: Computes the largest relative difference of each thing compared.
        within: How large a difference may be.
    """

    method: str
    repository: str
    commit: str
    compared: str
    run: Callable[[Repository], Findings]
    within: float = 1e-5

    def at(self, folder: Path) -> Repository:
        """Return its repository under a folder of clones."""
        return Repository(self.repository, self.commit, folder / self.repository.replace("/", "+"))
