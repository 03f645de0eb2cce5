"""Fed-RAC-LoRA from seed to merge, in plain torch, for a reader.

    python -m fedraclora.experiments.one_round

The rest of this project computes the same for any model, loss and method, for many clients as one
batch and over networks; `tests/equivalence/test_one_round.py` holds the engines to this file. Each
function names where the project does its step.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from fedraclora.rng import generator, hash_key, torch_normal
from fedraclora.sketch import SketchSpec

Tree = dict[str, torch.Tensor]  # by the name of a weight
Samples = tuple[torch.Tensor, torch.Tensor]  # inputs [samples, n], classes [samples]


@dataclass(frozen=True)
class Settings:
    """Of a run: the seed, rank r and alpha of an adapter, step size and number of local steps."""

    seed: int = 0
    rank: int = 4
    alpha: float = 2.0
    lr: float = 2.0
    steps: int = 5

    @property
    def scale(self) -> float:
        """Of every adapter, s = alpha / r."""
        return self.alpha / self.rank


def draw(W: Tree, t: int, run: Settings) -> Tree:
    """Draw A_t [r, n] of each weight [m, n], with orthonormal rows: everybody can, by its seed.

    `factors` of `strategies/methods/fed_rac_lora.py` asks for it; `fedraclora/sketch` draws.
    """
    A = {}
    for name, w in W.items():
        seed = hash_key(run.seed, "sketch", name) >> 65  # all that goes down of A: 8 bytes
        A[name] = SketchSpec("orthonormal", "right", run.rank, w.shape[1], seed, index=t - 1).draw()
    return A


def network(W: Tree, x: torch.Tensor) -> torch.Tensor:
    """Apply a model of two layers.

    `fedraclora/training/adapted.py` adds B A without forming the weight.
    """
    return torch.relu(x @ W["0.weight"].mT) @ W["2.weight"].mT


def train(W: Tree, A: Tree, samples: Samples, run: Settings) -> Tree:
    """Train at one client: B [m, r] from zero, by plain gradient steps; W and A stay.

    `fedraclora/training/cohort.py`, for many clients as one batch.
    """
    x, y = samples
    B = {name: torch.zeros(len(w), run.rank, requires_grad=True) for name, w in W.items()}
    for _ in range(run.steps):
        adapted = {name: w + run.scale * B[name] @ A[name].float() for name, w in W.items()}
        gradients = torch.autograd.grad(cross_entropy(network(adapted, x), y), [*B.values()])
        for b, g in zip(B.values(), gradients, strict=True):
            b.data -= run.lr * g
    return {name: b.detach() for name, b in B.items()}


def mean(replies: list[Tree], samples: list[int]) -> Tree:
    """Average each B with the clients' numbers of samples as weights, in float64, rounded once.

    `Uplinks.mean` of `fedraclora/protocol/uplinks.py`.
    """
    total = {name: torch.zeros_like(b, dtype=torch.float64) for name, b in replies[0].items()}
    for B, weight in zip(replies, samples, strict=True):
        for name, b in B.items():
            total[name] += weight * b.double()
    return {name: (b / sum(samples)).float() for name, b in total.items()}


def merge(W: Tree, B: Tree, A: Tree, run: Settings) -> Tree:
    """Fold in W + s B_bar A: since all had one A, that is the mean of the clients' W + s B_k A.

    `update` of `strategies/methods/fed_rac_lora.py` says what is merged, and `closed` of
    `strategies/shared/common.py` merges it, by `apply_link` of `fedraclora/protocol/link.py`.
    """
    return {n: (w.double() + run.scale * B[n].double() @ A[n]).float() for n, w in W.items()}


def one_round(W: Tree, clients: list[Samples], t: int, run: Settings) -> tuple[Tree, Tree]:
    """Give the weights after round t, from 1, and B_bar: the link that leads to them.

    `strategies/base.py` has the loop, `strategies/server/exchange.py` what is asked and came back.
    """
    A = draw(W, t, run)
    replies = [train(W, A, samples, run) for samples in clients]  # r m numbers of a weight come up
    B = mean(replies, [len(y) for _, y in clients])
    return merge(W, B, A, run), B


def catch_up(W: Tree, chain: list[Tree], run: Settings) -> Tree:
    """Bring a client that was away up to date: of each round it fetches B_bar, and draws A_t.

    `fedraclora/weights/replica.py`; `fedraclora/weights/chain.py` counts what is less to fetch.
    """
    for t, B in enumerate(chain, start=1):
        W = merge(W, B, draw(W, t, run), run)
    return W


def main() -> None:
    """Run ten rounds of three clients on made-up samples; a fourth comes late."""
    rng, run, chain = generator(0, "one_round"), Settings(), list[Tree]()
    x, teacher, first, second = (torch_normal(rng, *shape).float() for shape in SHAPES)
    y = (x @ teacher).argmax(dim=1)
    clients = [*zip(x.split([50, 30, 10]), y.split([50, 30, 10]), strict=True)]
    W = start = {"0.weight": first / 8, "2.weight": second / 8}
    for t in range(1, 11):
        W, B = one_round(W, clients, t, run)
        chain.append(B)
        print(f"round {t}: loss {float(cross_entropy(network(W, x), y)):.3f}")
    up, whole = (sum(t.nbytes for t in tree.values()) for tree in (chain[0], W))
    late = catch_up(start, chain, run)
    same = all(torch.equal(late[name], W[name]) for name in W)
    print(f"a client sends {up} bytes a round; the weights have {whole}")
    print(f"a late client fetches {up * len(chain)} bytes and has the server's bits: {same}")


SHAPES = (90, 60), (60, 3), (40, 60), (3, 40)  # inputs, teacher, the two layers

if __name__ == "__main__":
    main()
