"""Quantize the downlink: the server rounds an update before it applies it, so copies stay equal.

    link:     W <- W + s Q(B_bar) A;   a tensor trained in full:  x <- x + Q(x_new - x)
    carried:  B_bar <- Q(B_bar), as the next round sends it
    pool:     S <- S + B_bar;  B^(j) <- Q(S), or W <- W + s Q(S) A where the pool is folded
    frozen:   A <- Q(A), as the first round of its link sends it; then it stays

A frozen factor that is computed from the last merge follows from Q(B_bar), and is not rounded. One
whose numbers are sent is rounded once per merge period, and kept as it was sent (`FROZEN`): clients
train with the same bits in each round, and the server measures and merges with these.

So the server's state, the stored merges, every replica, late clients and a resumed run have the
same bits, and a round is exact for the sent numbers.

S is the sum of all links under one sketch of a pool, which only the server has: what rounding left
of it, S - Q(S), is kept for the next link. So a part is off by one rounding, however often it is
published. With ``compression.feedback`` the same holds of a factor that lives on, for as long as
its link, and of tensors trained in full; Q then rounds to the nearest (`fedraclora.wire.feedback`):

    carried:  B_bar <- Q(B_bar + e),  e <- B_bar + e - Q(B_bar + e);  at its end e is merged, too
    in full:  x <- x + Q(x_new - x + e),  and e likewise

The residues are with the moments of the state (`RESIDUE`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedraclora.protocol.factor import FROZEN, adapted_weight, weight_of
from fedraclora.protocol.method import (
    Factor,
    Link,
    Plan,
    RoundInstructions,
    State,
    Term,
    apply_link,
)
from fedraclora.protocol.quantized import FULL, rounded
from fedraclora.rng import generator
from fedraclora.tree import Tree, parameters

RESIDUE = "residue/"  # prefix in `State.moments`; the rest is the name of the part


@dataclass
class DownlinkRounding:
    """Quantizes the result of a round, and the downlink.

    Attributes:
        kind: Number format of the downlink; `FULL`: no quantization.
        seed: The seed of the run.
        feedback: Whether the server uses error feedback for continued tensors.
        squares: Sums of squares in the last round: of its results, and of the rounding errors.
    """

    kind: str
    seed: int
    feedback: bool = False
    squares: tuple[float, float] = (0.0, 0.0)

    @property
    def columns(self) -> dict[str, float]:
        """Compute the rounding error of the last round, relative to the norm of its results."""
        left, added = self.squares
        return {} if self.kind == FULL else {"rounding_down": (added / (left or 1.0)) ** 0.5}

    def sent(self, downlink: RoundInstructions, round_: int) -> RoundInstructions:
        """Quantize the downlink; values that the last round quantized stay as they are."""
        if self.kind == FULL:
            return downlink

        def change(name: str, factor: Factor) -> Factor:
            rows = factor.per_client
            # Sent again in each round of its merge period, also after a failed round.
            keys = ("frozen", downlink.link) if stays(factor) else (round_,)
            return factor.with_numbers(lambda t: self._rounded(t, *keys, name, apart=rows))

        extras = {
            extra: {n: self._rounded(t, round_, extra, n) for n, t in tree.items()}
            for extra, tree in downlink.extras.items()
        }
        return replace(downlink.mapped(change), extras=extras)

    def closed(self, before: State, after: State, sent: RoundInstructions, round_: int) -> State:
        """Quantize the result of a round.

        Args:
            before: The state before the round.
            after: The state after the round.
            sent: The last instructions.
            round_: From 1.
        """
        if self.kind == FULL:
            return after
        self.squares = (0.0, 0.0)
        base, parts, moments = before.base, list[Link](), dict(after.moments)
        ends = after.counters.sketch != before.counters.sketch
        for i, part in enumerate((after.link or Link()).parts()):
            terms = {
                name: self._term(
                    summed(name, term, moments, sent) if ends else term, round_, i, name
                )
                for name, term in part.terms.items()
            }
            for name in parameters(part.dense):
                value = part.dense[name].double()  # on the host; the base may be on a GPU
                change = self._with_left(value - base[name].to(value), name, moments)
                keys = ("link", i, name, 0)
                found = self._counted(change, round_, *keys, nearest=self.feedback)
                terms[name] = Term.of([found], 1.0, kind=self.kind)
                self._keep(name, change, found, moments)
            values = part.dense.keys() - parameters(part.dense).keys()
            kept = {
                n: self._part(n, part.dense[n], moments, round_)
                if weight_of(n) is None  # for a pool
                else self._counted(part.dense[n].cpu(), round_, "link", n).to(part.dense[n])
                for n in sorted(values)
            }
            parts.append(Link(terms, kept, kind=self.kind))
            base = apply_link(base, parts[-1], before.plan)
        if ends:
            of_link = {RESIDUE + name for name in sent.factors()}
            moments = {name: t for name, t in moments.items() if name not in of_link}
        carried = dict(after.carried)
        frozen = {n: f.draw() for n, f in sent.factors().items() if stays(f)}
        for name in travelling(carried, sent, after.plan):
            if same(name, carried[name], frozen):
                self._count(carried[name], carried[name])
                continue
            whole = self._with_left(carried[name], name, moments)
            nearest = self.feedback and not ends
            found = self._counted(whole, round_, name, nearest=nearest)
            carried[name] = found.to(carried[name])
            if not ends:
                self._keep(name, whole, carried[name], moments)
        if not ends and sent.program.trains:  # otherwise the factors have just begun
            carried |= {FROZEN + n: t for n, t in frozen.items() if not same(n, t, carried)}
        first, *rest = parts
        link = after.link and replace(first, rest=tuple(rest))
        return replace(after, base=base, carried=carried, link=link, moments=moments)

    def _term(self, term: Term, round_: int, part: int, name: str) -> Term:
        def change(i: int, factor: Factor) -> Factor:
            keys = ("link", part, name, i)
            return factor.with_numbers(lambda t: self._counted(t, round_, *keys))

        factors = tuple(change(i, factor) for i, factor in enumerate(term.factors))
        return replace(term, factors=factors, kind=self.kind)

    def _part(self, name: str, value: torch.Tensor, moments: Tree, round_: int) -> torch.Tensor:
        """Round the new value of a part of a pool; ``moments`` keep what that leaves of the sum."""
        left = moments.pop(RESIDUE + name, None)
        if not value.numel():  # the pool has been folded, and begins anew
            return value
        of_link = moments.get(RESIDUE + name.rpartition(".")[0])
        total = sum((e for e in (left, of_link) if e is not None), value.double())
        found = self._counted(total, round_, "link", name)
        moments[RESIDUE + name] = total - found
        return found.to(value.dtype)

    def _with_left(self, value: torch.Tensor, name: str, moments: Tree) -> torch.Tensor:
        """Add the residue of a value from its last rounding."""
        left = moments.get(RESIDUE + name)
        return value if left is None else value.double() + left

    def _keep(self, name: str, whole: torch.Tensor, found: torch.Tensor, moments: Tree) -> None:
        """Keep the residue of a value, if clients also do."""
        if self.feedback:
            moments[RESIDUE + name] = whole.double() - found.double()

    def _counted(
        self, tensor: torch.Tensor, *keys: str | int, nearest: bool = False
    ) -> torch.Tensor:
        """Round a tensor, and add to the sums of squares."""
        found = self._rounded(tensor, *keys, nearest=nearest)
        self._count(tensor, found)
        return found

    def _count(self, tensor: torch.Tensor, found: torch.Tensor) -> None:
        (left, added), error = self.squares, found.double() - tensor.double()
        self.squares = (
            left + float(tensor.double().square().sum()),
            added + float(error.square().sum()),
        )

    def _rounded(
        self,
        tensor: torch.Tensor,
        *keys: str | int,
        apart: bool = False,
        nearest: bool = False,
    ) -> torch.Tensor:
        rng = generator(self.seed, "downlink", *keys)
        return rounded(tensor, self.kind, rng, len(tensor) if apart else 1, nearest=nearest)


def stays(factor: Factor) -> bool:
    """Return whether a factor is frozen, shared by all clients, and sent as numbers."""
    return not (factor.trained or factor.numbers is None or factor.per_client)


def same(name: str, value: torch.Tensor, tree: Tree) -> bool:
    """Return whether a tree has this value under a name."""
    return name in tree and torch.equal(value, tree[name])


def travelling(carried: Tree, sent: RoundInstructions, plan: Plan) -> list[str]:
    """Name the carried tensors that are sent to clients unquantized.

    Args:
        carried: By name.
        sent: What the cohort was asked last.
        plan: Of the run: a factor may begin with the link that follows.
    """
    return [n for n in carried if n in sent.named or adapted_weight(n, plan.targets) is not None]


def summed(name: str, term: Term, moments: Tree, sent: RoundInstructions) -> Term:
    """Add to what is folded into a weight what rounding has left of it: a factor, or a pool's.

    Args:
        name: Of the weight.
        term: What is folded.
        moments: Hold the residues.
        sent: What the cohort was asked last. A frozen factor is folded as it was sent.
    """
    trained = sent.trained()

    def exact(factor: Factor, label: str) -> Factor:
        key, dim = f"{name}/{label}", "AB".index(label)
        if key not in trained or factor.numbers is None:
            return factor
        names = sent.program.stored_parts(name, label)
        parts = list(factor.numbers.chunk(len(names) or 1, dim))
        for j, part in [*enumerate(names), (sent.frame[0], key)]:  # of the link that ends, too
            if (left := moments.get(RESIDUE + part)) is not None:
                parts[j] = parts[j].double() + left
        return replace(factor, numbers=torch.cat(parts, dim))

    found = (exact(f, label) for f, label in zip(term.factors, "BA", strict=False))
    return replace(term, factors=(*found, *term.factors[2:]))
