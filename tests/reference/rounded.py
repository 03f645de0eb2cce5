"""Rounded rounds of low-rank methods, written to be read: matrices in NumPy, one client at a time.

It shares no code with the methods, the training or the quantizer whose oracle it is. Of a run it is
told what both ends know without being sent numbers: the drawings, and which layers a round adapts.
The draws of Q are those of the seed tree.

The model is ``y = W_L ... W_1 x``, the loss half the squared error, and a client takes a few steps
of plain SGD on all of its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedraclora.rng import generator

Matrix = NDArray[np.float64]
Factors = dict[str, Matrix]  # of a layer, by label
Rng = np.random.Generator
LEVELS = {"int8": 127, "int4": 7}
BLOCK = 32


def quantized(x: Matrix, kind: str, rng: Rng) -> Matrix:
    """Q(x) = s floor(x / s + u), a power of two s for each block: the least with max |x| <= L s."""
    found, most = [], LEVELS[kind]
    u = rng.integers(1 << 32, size=x.size) / 2.0**32
    for i in range(0, x.size, BLOCK):
        block, s = x.reshape(-1)[i : i + BLOCK], 2.0**-127
        if block.any():
            s = 2.0 ** np.ceil(np.log2(np.abs(block).max() / most))
        found.append(s * np.clip(np.floor(block / s + u[i : i + BLOCK]), -most, most))
    return np.concatenate(found).reshape(x.shape)


@dataclass(frozen=True)
class Asked:
    """What a round asks of one layer, by label in the order of the product.

    Attributes:
        begins: Drawings, and zeros; None for what is carried.
        trained: Labels of what is trained.
    """

    begins: dict[str, Matrix | None]
    trained: tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """What a round makes of a layer: factors that live on, and a product for W."""

    carried: Factors = field(default_factory=dict)
    merged: tuple[Matrix, Matrix] | None = None


@dataclass(frozen=True)
class Came:
    """What came of one layer.

    Attributes:
        p: Shares [K].
        each: Factors of all clients, by label.
        frozen: Those that nobody trained.
        carried: What lived on from the last round.
        round_: From 1.
    """

    p: Matrix
    each: dict[str, Matrix]
    frozen: Factors
    carried: Factors
    round_: int

    def mean(self, label: str) -> Matrix:
        """Return sum_k p_k F_k."""
        return np.tensordot(self.p, self.each[label], 1)

    @property
    def product(self) -> tuple[Matrix, Matrix]:
        """Return [p_k B_k] and [A_k]: side by side, and one on top of the other."""
        pairs = zip(self.p, self.each["B"], strict=True)
        return np.hstack([p * B for p, B in pairs]), np.vstack([*self.each["A"]])


Close = Callable[[Came], Left]


def means(came: Came) -> Left:
    return Left({label: came.mean(label) for label in came.each})


def by_turns(came: Came) -> Left:
    return Left(came.carried | means(came).carried)  # a drawing is not carried


def links_of(rounds: int, shrink: float = 1.0) -> Close:
    """W <- W + s B_bar A_bar every so many rounds, both factors begun anew."""

    def close(came: Came) -> Left:
        B, A = came.mean("B"), came.mean("A")
        return Left({"B": B, "A": A}) if came.round_ % rounds else Left(merged=(shrink * B, A))

    return close


def stacking(came: Came) -> Left:
    return Left(merged=came.product)


def fedex(came: Came) -> Left:
    B, A = came.each["B"][:-1] - came.mean("B"), came.each["A"]
    left = np.hstack([p * b for p, b in zip(came.p[:-1], B, strict=True)])
    return replace(means(came), merged=(left, np.vstack([*(A[:-1] - A[-1])])))


def fair(came: Came, ridge: float = 0.01) -> Left:
    """B <- B_bar + D, D the ridge fit of D A_bar to what separate means miss."""
    (B, A), (left, right) = (came.mean("B"), came.mean("A")), came.product
    missed = left @ right - B @ A
    return Left({"B": B + missed @ A.T @ np.linalg.inv(A @ A.T + ridge * np.eye(len(A))), "A": A})


def het(came: Came) -> Left:
    norms = [np.linalg.norm(B @ A) for B, A in zip(came.each["B"], came.each["A"], strict=True)]
    w = came.p * np.array(norms)
    return means(replace(came, p=w / w.sum()))


def rot(came: Came) -> Left:
    """The mean of the clients, each turned by the nearest rotation to the last B or A, by turns."""
    Bs, As = came.each["B"], came.each["A"]
    if not came.carried:
        return means(came)
    turned = []
    for B, A in zip(Bs, As, strict=True):
        M = A @ came.carried["A"].T if came.round_ % 2 == 0 else B.T @ came.carried["B"]
        U, _, Vt = np.linalg.svd(M)
        U[:, -1] *= np.sign(np.linalg.det(U @ Vt))
        turned.append((B @ (U @ Vt), (U @ Vt).T @ A))
    B, A = (np.stack(factor) for factor in zip(*turned, strict=True))
    return means(replace(came, each={"B": B, "A": A}))


def svd(M: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """U S V^T, the largest entry in each column of U positive."""
    U, S, Vt = np.linalg.svd(M, full_matrices=False)
    signs = np.sign(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])])
    return U * signs, S, signs[:, None] * Vt


def momentum(came: Came) -> Left:
    left, right = came.product
    U, S, Vt = svd(left @ right)
    q = min(left.shape[1], len(S))  # as many as the stack may have
    B, A, r = U[:, :q] * np.sqrt(S[:q]), np.sqrt(S[:q, None]) * Vt[:q], came.each["A"].shape[1]
    return Left({"B": B[:, :r], "A": A[:r]}, merged=(B[:, r:], A[r:]))


def flex(came: Came) -> Left:
    return replace(momentum(came), merged=None)


def fedsvd(came: Came) -> Left:
    """B <- U S, A <- V^T of B_bar A."""
    A = came.frozen["A"]
    U, S, Vt = svd(came.mean("B") @ A)
    return Left({"B": U[:, : len(A)] * S[: len(A)], "A": Vt[: len(A)]})


@dataclass
class RoundedRun:
    """A run of all clients in each round.

    Attributes:
        weights: W of each layer, from the first on; (out, in).
        scale: s.
        close: What a round makes of a layer.
        rate, steps: Of the clients.
        data: Samples x [N_k, n] and y of each client.
        up, down: Kinds of numbers.
        seed: Of the run.
        recipe: Of the method, by which uploads draw.
        keeps: Labels of what stays at the clients.
        blocks: Of the diagonal of R, outside of which nothing is trained; 0: all of it is.
    """

    weights: dict[str, Matrix]
    scale: float
    close: Close
    rate: float
    steps: int
    data: list[tuple[Matrix, Matrix]]
    up: str
    down: str
    seed: int
    recipe: str = "plain"
    keeps: tuple[str, ...] = ()
    blocks: int = 0
    carried: dict[str, Factors] = field(default_factory=dict)
    own: list[dict[str, Factors]] = field(default_factory=list)
    begins: dict[str, dict[str, Matrix | None]] = field(default_factory=dict)
    off: float = 0.0

    def effective(self, factors: Mapping[str, Factors]) -> dict[str, Matrix]:
        """W + s times the product of the factors, which are in order."""
        found = dict(self.weights)
        for name, each in factors.items():
            found[name] = found[name] + self.scale * np.linalg.multi_dot([*each.values()])
        return found

    def now(self, client: int) -> dict[str, Matrix]:
        """The weights between two rounds; of a client where it keeps a part."""
        kept = self.own[client] if self.own else {}
        layers = {n: f | kept.get(n, {}) for n, f in self.carried.items()}
        return self.effective({n: self.in_order(n, f) for n, f in layers.items() if f})

    def in_order(self, name: str, known: Factors) -> Factors:
        """All factors of a layer, in the order of their product."""
        whole = {**self.begins[name], **known}
        return {k: f for k, f in whole.items() if f is not None}

    def loss(self, x: Matrix, y: Matrix) -> float:
        """Half the squared error, its mean over samples."""
        for W in self.now(0).values():
            x = x @ W.T
        return float(((x - y) ** 2).sum() / (2 * len(x)))

    def gradients(self, weights: Mapping[str, Matrix], x: Matrix, y: Matrix) -> dict[str, Matrix]:
        """Of half the squared error, its mean over the samples."""
        names, seen = [*weights], [x]
        for name in names:
            seen.append(seen[-1] @ weights[name].T)
        back, found = (seen.pop() - y) / len(x), {}
        for name in reversed(names):
            found[name] = back.T @ seen.pop()
            back = back @ weights[name]
        return found

    def train(self, start: dict[str, Factors], asked: Mapping[str, Asked], k: int) -> None:
        """Take the steps of one client, in place."""
        for _ in range(self.steps):
            G = self.gradients(self.effective(start), *self.data[k])
            slopes = {}
            for name, factors in start.items():
                for label in asked[name].trained:
                    labels = [*factors]
                    at = labels.index(label)
                    before = [factors[other].T for other in labels[:at]][::-1]
                    after = [factors[other].T for other in labels[at + 1 :]][::-1]
                    slope = self.scale * np.linalg.multi_dot([*before, G[name], *after])
                    if self.blocks:
                        size = len(slope) // self.blocks
                        slope = slope * np.kron(np.eye(self.blocks), np.ones((size, size)))
                    slopes[name, label] = slope
            for (name, label), slope in slopes.items():
                start[name][label] = start[name][label] - self.rate * slope

    def start_of(self, name: str, k: int) -> Factors:
        """Return where the factors of a layer start at a client."""
        own = self.own[k].get(name, {}) if self.own else {}
        return self.in_order(name, self.carried.get(name, {}) | own)

    def round(self, asked: Mapping[str, Asked], round_: int) -> None:
        """Train, round, close and round again."""
        self.begins |= {name: a.begins for name, a in asked.items()}
        K, sizes = len(self.data), np.array([len(x) for x, _ in self.data])
        starts = [{n: self.start_of(n, k) for n in asked} for k in range(K)]
        ends = [{n: dict(f) for n, f in start.items()} for start in starts]
        for k, end in enumerate(ends):
            self.train(end, asked, k)
            rng = generator(self.seed, "uplink", round_, self.recipe, k)
            for name, label in ((n, label) for n, a in asked.items() for label in a.trained):
                if label in self.keeps:
                    continue
                first = starts[k][name][label]
                end[name][label] = first + quantized(end[name][label] - first, self.up, rng)
        if self.keeps:
            self.own = [{n: {c: f[c] for c in self.keeps} for n, f in e.items()} for e in ends]
        left = added = 0.0

        def rounded(x: Matrix, *keys: str | int) -> Matrix:
            nonlocal left, added
            found = quantized(x, self.down, generator(self.seed, "downlink", round_, *keys))
            left, added = left + (x**2).sum(), added + ((found - x) ** 2).sum()
            return found

        after: dict[str, Factors] = {}
        for name, a in asked.items():
            sent = [label for label in a.trained if label not in self.keeps]
            each = {label: np.stack([end[name][label] for end in ends]) for label in sent}
            frozen = {n: f for n, f in starts[0][name].items() if n not in a.trained}
            came = Came(sizes / sizes.sum(), each, frozen, self.carried.get(name, {}), round_)
            closed = self.close(came)
            if closed.merged is not None:
                B, A = (rounded(f, "link", 0, name, i) for i, f in enumerate(closed.merged))
                self.weights[name] = self.weights[name] + self.scale * B @ A
            after[name] = closed.carried
        self.carried = {
            n: {label: rounded(f, f"{n}/{label}") for label, f in factors.items()}
            for n, factors in after.items()
        }
        self.off = (added / (left or 1.0)) ** 0.5
