"""Second moments of rows: what they are under any sketch, the steps from them, and their mean."""

from __future__ import annotations

import pytest
import torch

from fedraclora.errors import ConfigError
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.instructions import Adapter, RoundInstructions
from fedraclora.sketch import SketchSpec
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.optimizer import ROW_SLOT, CohortOptimizer, row_slots, taken_rows
from fedraclora.tree import Tree
from tests.common import accepted, normal

M, N, R, SCALE = 5, 7, 2, 1.5
A = SketchSpec("orthonormal", "right", R, N, seed=3, index=0)
SENT = RoundInstructions(
    {"w": Adapter.of({"B": to_train((M, R)), "A": A}, SCALE)}, {"b": to_train((M,))}
)
ROUND = LocalConfig(optimizer="adamw", lr=0.1, weight_decay=0.2, beta1=0.8, beta2=0.9)


@pytest.mark.parametrize("kind", ["orthonormal", "gaussian", "coordinate"])
def test_rows_have_one_second_moment_under_all_sketches(kind: str) -> None:
    """By 3,000 drawings of rows of length one in the mean; E[g_ij^2] = s^2 ||G_i||^2 / n."""
    G, squares = normal(M, N), torch.zeros(M).double()
    for index in range(3000):
        drawn = SketchSpec(kind, "right", R, N, seed=5, index=index, normalize="rows").draw()
        squares += (SCALE * G @ drawn.T).square().mean(dim=1) / 3000
    torch.testing.assert_close(squares, SCALE**2 * G.square().sum(dim=1) / N, rtol=0.08, atol=0)


def test_steps_are_those_of_adamw_from_the_second_moments_of_rows() -> None:
    """By hand, for clients of 4 and 2 steps: B, A, and a bias that begins without moments."""
    shapes, steps = {"w/B": (M, R), "v/A": (R, N), "b": (M,)}, torch.tensor([4, 2])
    values = {n: normal(2, *s, key=len(n) + s[0]) for n, s in shapes.items()}
    rows = {"w/B": normal(M + 1, key=1).square(), "v/A": normal(N + 1, key=2).square()}
    rows["w/B"][-1], rows["v/A"][-1] = 0.3, 0.6
    wanted: dict[str, list[torch.Tensor]] = {n: [] for n in shapes}
    sent: dict[str, list[torch.Tensor]] = {n: [] for n in rows}
    gradients = {n: normal(4, 2, *s, key=9 + len(n) + s[0]) for n, s in shapes.items()}
    for (name, shape), k in ((item, k) for item in shapes.items() for k in (0, 1)):
        x, m, v, w = values[name][k].clone(), torch.zeros(shape).double(), torch.zeros(shape), 0.0
        if name in rows:
            start = rows[name][:-1]
            v, w = start[:, None] if name == "w/B" else start[None], float(rows[name][-1])
            v = v.expand(shape)
        for t in range(1, int(steps[k]) + 1):
            g = gradients[name][t - 1, k]
            x = x - 0.1 * 0.2 * x
            m, v, w = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g, 0.9 * w + 0.1
            x = x - 0.1 * (m / (1 - 0.8**t)) / ((v / w).sqrt() + ROUND.eps)
        wanted[name].append(x)
        if name in rows:
            mean = v.mean(dim=1 if name == "w/B" else 0)
            sent[name].append(torch.cat([mean, torch.tensor([w])]))
    optimizer = CohortOptimizer(ROUND, values, dict.fromkeys(shapes, 0.1), rows=rows)
    for t in range(4):
        active = int((steps > t).sum())
        optimizer.step({n: g[t, :active] for n, g in gradients.items()})
    for name in shapes:
        torch.testing.assert_close(values[name], torch.stack(wanted[name]))
    found = optimizer.rows(steps)
    assert found.keys() == rows.keys()
    for name, each in sent.items():
        torch.testing.assert_close(found[name], torch.stack(each))


def test_the_correction_is_right_however_many_steps_clients_take() -> None:
    """Under gradients that never change v / w is their square, in all rounds, for any weights."""
    gradient, kept = normal(M, 1).expand(M, R), Tree()
    for round_, steps in enumerate([(1, 5), (7, 2), (3, 3)], start=1):
        sent = RoundInstructions(SENT.adapters, SENT.dense | row_slots(SENT, kept))
        rest, rows = taken_rows(sent)
        assert rest == SENT
        shares, came = [0.25, 0.75], []
        for taken in steps:
            values = {"w/B": torch.zeros(1, M, R).double()}
            optimizer = CohortOptimizer(ROUND, values, {"w/B": 0.1}, rows=rows)
            for t in range(taken):
                optimizer.step({"w/B": gradient[None]})
                if round_ == 1 and t == 0:
                    torch.testing.assert_close(values["w/B"], -0.1 * gradient.sign()[None])
            came.append(optimizer.rows(torch.tensor([taken]))["w/B"][0])
        kept = {f"{ROW_SLOT}w/B": sum(p * c for p, c in zip(shares, came, strict=True))}  # type: ignore[dict-item]
        v, w = kept[f"{ROW_SLOT}w/B"][:-1], kept[f"{ROW_SLOT}w/B"][-1]
        assert 0 < w < 1
        torch.testing.assert_close(v / w, gradient[:, 0].square())


def test_what_has_no_second_moment_has_none_of_rows() -> None:
    with pytest.raises(ConfigError, match=r"optimizer_state=rows .*without second moments"):
        accepted("local", LocalConfig(lr=0.5, momentum=0.5, optimizer_state="rows"))
