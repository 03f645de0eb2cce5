"""What each method's docstring says of its bytes, as formulas: numbers per client and round.

The methods count what they send; here the same numbers stand as they are written down. A method
that is not in the table is held against its messages alone.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod
from typing import Any

from fedraclora.protocol.link import Plan
from fedraclora.protocol.method import Method
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.shared.initials import STARTS

Count = tuple[int, int]


def dense(plan: Plan) -> int:
    """Numbers of head, biases and what else is trained in full and averaged."""
    return sum(prod(plan.shapes[name]) for name in plan.dense)


def sizes(method: Any, plan: Plan) -> tuple[int, int]:
    """Numbers of all B (r m each) and of all A (r n each)."""
    shapes = {name: view.shape for name, view in plan.targets.items()}
    ranks = {name: method.rank_of(plan, name) for name in shapes}
    return tuple(sum(ranks[n] * shapes[n][side] for n in shapes) for side in (0, 1))  # type: ignore[return-value]


def age(round_: int, merge_every: int | None) -> int:
    """Rounds that the link of a round has lived before it."""
    return (round_ - 1) % merge_every if merge_every else round_ - 1


def full(method: Any, plan: Plan, round_: int) -> Count:
    """Every weight up; nothing down but what the client missed."""
    return sum(prod(plan.shapes[n]) for n in plan.weights) + dense(plan), 0


def trained_side(method: Any, plan: Plan, label: str) -> int:
    """Numbers of the factors beside the drawn ones: r m where A is drawn, r n where B is."""
    total = 0
    for name, view in plan.targets.items():
        m, n = view.shape
        right = label == "B" or (label == "auto" and n >= m)
        total += method.rank_of(plan, name) * (m if right else n)
    return total


def one_factor(method: Any, plan: Plan, round_: int) -> Count:
    """r m (left: r n) up; a seed down, and the carried factor, of all groups, within a link."""
    trained = trained_side(method, plan, method.train)
    carried = trained * method.sketches if age(round_, method.merge_every) else 0
    return trained + dense(plan), carried


def by_turns(method: Any, plan: Plan, round_: int) -> Count:
    """r m up in right links, r n in left ones; down 2 r^2 coefficients, or unit rows as they are.

    Within a link what lives on, too.
    """
    link, begun = divmod(round_ - 1, method.merge_every)
    both = sizes(method, plan)
    trained = both[0] if link % 2 == 0 else both[1]
    frozen = 0
    for name, view in plan.targets.items():
        r, d = method.rank_of(plan, name), view.shape[1 - link % 2]
        frozen += r * (2 * r if method.basis == "singular" else d)
    drawn = link == 0 or method.fresh == 1 or (method.pairs and link % 2 == 0)
    return trained + dense(plan), frozen * (not drawn) + trained * (begun > 0)


def by_coin(method: Any, plan: Plan, round_: int) -> Count:
    """r n where the coin says B is drawn, r m where A is; a seed down."""
    drawn = method.round_method(round_)
    return trained_side(drawn, plan, drawn.train) + dense(plan), 0


def in_turn(method: Any, plan: Plan, round_: int) -> Count:
    """G r m up; a seed down."""
    return sizes(method, plan)[0] * method.sketches + dense(plan), 0


def cores(method: Any, plan: Plan, round_: int) -> Count:
    """(h r)^2 each way (h = 1 without heads), and seeds alone in the first round."""
    heads = getattr(method, "heads", 1)
    core = sum((heads * method.rank_of(plan, name)) ** 2 for name in plan.targets)
    return core + dense(plan), core if round_ > 1 else 0


def both(method: Any, plan: Plan, round_: int) -> Count:
    """r (m + n) each way, and a seed alone in the first round, unless the factors begin carried."""
    factors = sum(sizes(method, plan))
    begun = round_ > 1 or method.init in STARTS
    return factors + dense(plan), factors if begun else 0


def in_links(method: Any, plan: Plan, round_: int) -> Count:
    """As `both`, and a seed alone where a link begins."""
    if method.merge_every is None:
        return both(method, plan, round_)
    factors = sum(sizes(method, plan))
    return factors + dense(plan), factors if age(round_, method.merge_every) else 0


def anew(method: Any, plan: Plan, round_: int) -> Count:
    """r (m + n) up; a seed down in every round."""
    return sum(sizes(method, plan)) + dense(plan), 0


def boosted(method: Any, plan: Plan, round_: int) -> Count:
    """As `anew`, for the layers of the round; head and biases are those of the whole model."""
    return anew(method, method.subset(plan, round_), round_)


def sketched(method: Any, plan: Plan, round_: int) -> Count:
    """k_c (m + n) each way, from the first round on."""
    chosen = sum(
        ceil(method.share * method.rank_of(plan, name)) * sum(view.shape)
        for name, view in plan.targets.items()
    )
    return chosen + dense(plan), chosen


def shared_half(method: Any, plan: Plan, round_: int) -> Count:
    """r n each way: A alone travels; a seed in the first round."""
    _, A = sizes(method, plan)
    return A + dense(plan), A if round_ > 1 else 0


def turned(method: Any, plan: Plan, round_: int) -> Count:
    """r m up; r (m + n) down, and a seed in the first round."""
    B, A = sizes(method, plan)
    return B + dense(plan), A + B if round_ > 1 else 0


def alternating(method: Any, plan: Plan, round_: int) -> Count:
    """r m up in odd rounds, r n in even ones; down a seed, then r m, then r (m + n)."""
    B, A = sizes(method, plan)
    return (B if round_ % 2 else A) + dense(plan), {1: 0, 2: B}.get(round_, B + A)


def from_principal(method: Any, plan: Plan, round_: int) -> Count:
    """r (m + n) each way in every round."""
    factors = sum(sizes(method, plan))
    return factors + dense(plan), factors


def in_stages(method: Any, plan: Plan, round_: int) -> Count:
    """m n up in the sparse stage, nothing down; then r (m + n) each way."""
    if round_ > method.sparse_rounds:
        return from_principal(method, plan, round_)
    return sum(prod(plan.shapes[n]) for n in plan.targets) + dense(plan), 0


def by_steps(method: Any, plan: Plan, round_: int) -> Count:
    """K P numbers up; a seed down."""
    return method.steps * method.directions, 0


def by_seeds(method: Any, plan: Plan, round_: int) -> Count:
    """K sums up, or a number for each of tau steps; a seed down."""
    return method.seeds if method.steps is None else method.steps, 0


def by_blocks(method: Any, plan: Plan, round_: int) -> Count:
    """Of each block its share of the directions, two at least; in this world each weight is one
    but for small ones, which are joined until they have 0.9 of the median size."""
    sizes = [prod(plan.shapes[n]) for n in (*plan.weights, *plan.dense)]
    enough, blocks = 0.9 * sorted(sizes)[len(sizes) // 2], [0]
    if len(sizes) % 2 == 0:
        enough = 0.45 * sum(sorted(sizes)[len(sizes) // 2 - 1 : len(sizes) // 2 + 1])
    for size in sizes:
        blocks = [*blocks, 0] if blocks[-1] >= enough else blocks
        blocks[-1] += size
    return sum(max(method.directions * size // max(blocks), 2) for size in blocks), 0


FORMULAS: dict[str, Callable[[Any, Plan, int], Count]] = {
    "fed_rac_lora": one_factor,
    "fedavg": full,
    "galore_average": full,
    "fedavg_lora": in_links,
    "bernoulli_lora": by_coin,
    "decomfl": by_steps,
    "fed_sb": cores,
    "fedkseed": by_seeds,
    "ferret": by_blocks,
    "ravan": cores,
    "fedex_lora": both,
    "fedmomentum": both,
    "fedrot_lora": both,
    "flexlora": both,
    "hetlora": both,
    "lora_fair": both,
    "fedkrso": in_turn,
    "fedsa_lora": shared_half,
    "fslora": sketched,
    "fedsvd": turned,
    "flora_stacking": anew,
    "xgblora": boosted,
    "frlora": from_principal,
    "rolora": alternating,
    "slora": in_stages,
    "subspace_rac_lora": by_turns,
}


def formula_of(method: Method) -> Callable[[Any, Plan, int], Count]:
    """Give the formula of a method by its class."""
    kinds = {METHODS[name]: formula for name, formula in FORMULAS.items()}
    return kinds[type(method)]
