"""SoRA's gates: what they train, what they close, what is reported."""

from __future__ import annotations

import pytest
import torch

from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, RoundInstructions
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.training.extras.gates import CohortGates, Gates
from fedraclora.training.extras.pairs import Pair
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Layout, Tree
from tests.common import normal

K, M, R, N, LR = 2, 5, 3, 7, 0.1
RATES = {"w/B": LR, "w/A": LR, "b": LR}
PAIR = Pair("w", 1.0, {})


def values_of() -> Tree:
    return {"w/B": normal(K, M, R), "w/A": normal(K, R, N), "b": normal(K, 4)}


GRADIENTS = {n: normal(*v.shape, key="g") for n, v in values_of().items()}


def test_a_step_is_that_of_factor_and_gate_and_then_the_proximal_one() -> None:
    values, start = values_of(), values_of()
    CohortGates(LocalConfig(lr=0.5), values, RATES, [PAIR], 0.4).step(GRADIENTS)
    factor = start["w/B"] - LR * GRADIENTS["w/B"]  # under a gate of 1
    gate = 1 - LR * (GRADIENTS["w/B"] * start["w/B"]).sum(dim=1)
    gate = gate.sign() * (gate.abs() - LR * 0.4).clamp(min=0)
    torch.testing.assert_close(values["w/B"], factor * gate[:, None], rtol=1e-12, atol=1e-12)
    for name in ("w/A", "b"):
        wanted = start[name] - LR * GRADIENTS[name]
        torch.testing.assert_close(values[name], wanted, rtol=1e-12, atol=1e-12)


def test_gates_of_components_that_do_not_pay_close() -> None:
    """The gradient of one component holds its gate against the penalty; the others have none."""
    values = values_of()
    optimizer = CohortGates(LocalConfig(lr=0.5), values, RATES, [PAIR], 2.0)
    for _ in range(6):  # 6 * 0.1 * 2 > 1
        pull = {n: torch.zeros_like(v) for n, v in values.items()}
        pull["w/B"][:, :, 1] = -3.0 * values["w/B"][:, :, 1]
        optimizer.step(pull)
    empty = (values["w/B"] == 0).all(dim=1)
    assert empty.tolist() == [[True, False, True]] * K


def test_where_a_alone_is_trained_its_rows_have_the_gates() -> None:
    values = {"w/A": normal(K, R, N)}
    optimizer = CohortGates(
        LocalConfig(lr=0.5), values, RATES, [Pair("w", 1.0, {"w/B": normal(M, R)})], 20.0
    )
    optimizer.step({"w/A": torch.zeros(K, R, N).double()})
    assert torch.count_nonzero(values["w/A"]) == 0  # 0.1 * 20 > 1


def test_clients_that_have_finished_keep_what_they_have() -> None:
    values, start = values_of(), values_of()
    optimizer = CohortGates(LocalConfig(lr=0.5), values, RATES, [PAIR], 0.4)
    optimizer.step({n: g[:1] for n, g in GRADIENTS.items()})
    for name, value in values.items():
        assert torch.equal(value[1], start[name][1])
        assert not torch.equal(value[0], start[name][0])


@pytest.mark.parametrize("label", ["B", "A"])
def test_what_no_client_kept_is_reported(label: str) -> None:
    shape = (M, R) if label == "B" else (R, N)
    sent = RoundInstructions({"w": Adapter.of({label: to_train(shape)}, 1.0)})
    rows = normal(K, *shape)
    closed = rows.mT if label == "B" else rows
    closed[:, 0] = 0  # by both
    closed[0, 1] = 0  # by one of them
    layout = Layout(((f"w/{label}", shape),))
    got = Uplinks(
        torch.arange(K),
        torch.tensor([1.0, 3.0]).double(),
        layout,
        layout.pack({f"w/{label}": rows}, lead=1),
    )
    gates = Gates(0.4, LocalConfig(lr=0.5))
    assert gates.columns(sent, got) == {"pruned": pytest.approx(1 / R)}
    assert gates.columns(RoundInstructions(), got) == {}
