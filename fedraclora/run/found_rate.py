"""A learning rate that was found, and the file of a run folder that says how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedraclora.run.digests import sealed
from fedraclora.weights.files import write_text

RATES_FILE = "rates.json"


@dataclass(frozen=True)
class FoundRate:
    """A learning rate, and how it was found.

    Attributes:
        rate: It.
        how: ``search``; ``rule``, where nothing could be tried; ``kept``, where the run has one
            already.
        seconds: What the search took.
        trained: How often it had a client train for a round.
        share: The same as a share of the whole run.
        ladder: Each rate that was tried: ``rate``, ``losses`` by the number of rounds, and
            ``failed``, where it did.
        diverged: Higher rates at which the run diverged, after which it began anew.
    """

    rate: float
    how: str
    seconds: float = 0.0
    trained: int = 0
    share: float = 0.0
    ladder: tuple[dict[str, object], ...] = ()
    diverged: tuple[float, ...] = ()

    def described(self, *, factor: bool = False) -> str:
        """Describe it in one line.

        Args:
            factor: Whether it multiplies the rate of the user's function (``round.rate_scale``).
        """
        what = f"learning rate {self.rate:g}"
        if factor:
            what = f"factor {self.rate:g} on the learning rate of your function"
        if self.how == "kept":
            return f"{what}, found when the run began"
        if self.diverged:
            higher = " and ".join(f"{rate:g}" for rate in self.diverged)
            return f"{what}, since the run diverged at {higher}"
        if self.how == "rule":
            return f"{what}, by a rule: no rate was tried (docs/local.md)"
        tried = f"{len(self.ladder)} rate{'s' * (len(self.ladder) != 1)}"
        return f"{what}, found in {self.seconds:.1f} s over {tried}"

    def write(self, folder: Path) -> None:
        """Write it into a run folder."""
        write_text(
            folder / RATES_FILE,
            sealed({**vars(self), "ladder": [*self.ladder], "diverged": [*self.diverged]}),
        )
