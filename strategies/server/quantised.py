"""What the server says in fewer bits: what a round leaves is rounded before anybody has it.

    link:     W <- W + s Q(B_bar) A;   a tensor trained in full:  x <- x + Q(x_new - x)
    carried:  B_bar <- Q(B_bar), as the next round sends it

So the state at the server, the files of the chain, every replica, whoever comes late and a run that
goes on have the same bits, and a round is exact of what was sent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedraclora.protocol.downlink import differs, with_numbers
from fedraclora.protocol.method import Downlink, Factor, Link, State, Term, apply_link
from fedraclora.protocol.quantised import FULL, rounded
from fedraclora.rng import generator


@dataclass
class DownlinkRounding:
    """Rounds what a round leaves, and what is sent.

    Attributes:
        kind: How numbers go down; `FULL` leaves everything as it is.
        seed: Of the run.
        squares: Of the last round that was closed: of what it left, and of what rounding added.
    """

    kind: str
    seed: int
    squares: tuple[float, float] = (0.0, 0.0)

    @property
    def columns(self) -> dict[str, float]:
        """Compute what rounding added to what the last round left, relative to its norm."""
        left, added = self.squares
        return {} if self.kind == FULL else {"rounding_down": (added / (left or 1.0)) ** 0.5}

    def sent(self, downlink: Downlink, round_: int) -> Downlink:
        """Round what goes to the cohort; what the last round left stays as it is."""
        if self.kind == FULL:
            return downlink

        def change(name: str, factor: Factor) -> Factor:
            rows = differs(factor)
            return with_numbers(factor, lambda t: self._rounded(t, round_, name, apart=rows))

        extras = {
            extra: {n: self._rounded(t, round_, extra, n) for n, t in tree.items()}
            for extra, tree in downlink.extras.items()
        }
        return replace(downlink.mapped(change), extras=extras)

    def closed(self, before: State, after: State, sent: Downlink, round_: int) -> State:
        """Round what a round leaves.

        Args:
            before: The state in which it was opened.
            after: The state that closed it.
            sent: What the cohort was asked last.
            round_: From 1.
        """
        if self.kind == FULL:
            return after
        self.squares = (0.0, 0.0)
        base, parts = before.base, []
        for i, part in enumerate((after.link or Link()).parts()):
            terms = {name: self._term(term, round_, i, name) for name, term in part.terms.items()}
            for name, value in part.dense.items():
                whole = Term((value.double() - base[name].double(),), 1.0)
                terms[name] = self._term(whole, round_, i, name)
            parts.append(Link(terms))
            base = apply_link(base, parts[-1], before.plan)
        travels = {*sent.factors(), *sent.dense}
        carried = {
            name: self._counted(tensor, round_, name) if name in travels else tensor
            for name, tensor in after.carried.items()
        }
        first, *rest = parts
        link = after.link and replace(first, rest=tuple(rest))
        return replace(after, base=base, carried=carried, link=link)

    def _term(self, term: Term, round_: int, part: int, name: str) -> Term:
        factors = tuple(
            self._counted(f, round_, "link", part, name, i) if isinstance(f, torch.Tensor) else f
            for i, f in enumerate(term.factors)
        )
        return replace(term, factors=factors, kind=self.kind)

    def _counted(self, tensor: torch.Tensor, round_: int, *keys: str | int) -> torch.Tensor:
        """Round a tensor, and add to the squares."""
        found = self._rounded(tensor, round_, *keys)
        (left, added), error = self.squares, found.double() - tensor.double()
        self.squares = (
            left + float(tensor.double().square().sum()),
            added + float(error.square().sum()),
        )
        return found

    def _rounded(
        self, tensor: torch.Tensor, round_: int, *keys: str | int, apart: bool = False
    ) -> torch.Tensor:
        rng = generator(self.seed, "downlink", round_, *keys)
        return rounded(tensor, self.kind, rng, len(tensor) if apart else 1)
