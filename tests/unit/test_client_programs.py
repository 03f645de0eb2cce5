"""Client programs: what they do to gradients, and how a message holds them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.clients.node import know_programs
from fedraclora.codec import join, split
from fedraclora.errors import ConfigError
from fedraclora.limits import Count
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.protocol.method import Traits, check_method
from fedraclora.protocol.program import GRADIENT, PLAIN, ClientProgram
from fedraclora.sketch import SKETCHES, SketchSpec
from fedraclora.strategies.shared.walking import DirectionMethod
from fedraclora.training.extras.pairs import projected
from tests.common import normal
from tests.example_program import Example

M, R, N = 5, 2, 7


@pytest.mark.parametrize("kind", sorted(SKETCHES))
@pytest.mark.parametrize("normalize", ["rows", "identity", "none"])
def test_a_preconditioned_step_is_a_projected_step(kind: str, normalize: str) -> None:
    """(s G A^T) (A A^T)^+ A s = s^2 G H with H = A^T (A A^T)^+ A, whatever the scale of A."""
    spec = SketchSpec(kind, "right", R, N, seed=3, index=0, normalize=normalize)
    A, G, s = spec.draw(), normal(M, N), 1.5
    hook = projected({"w/A": A})
    step = s * hook({"w/B": (s * G @ A.mT)[None]})["w/B"][0] @ A
    H = torch.linalg.pinv(A) @ A
    torch.testing.assert_close(step, s**2 * G @ H, rtol=1e-12, atol=1e-12)


def test_a_left_sketch_projects_from_the_left() -> None:
    B, G = normal(M, R), normal(M, N)
    gradient = projected({"w/B": B})({"w/A": (B.mT @ G)[None]})["w/A"][0]
    torch.testing.assert_close(B @ gradient, B @ torch.linalg.pinv(B) @ G, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 3))
def test_factors_of_their_own_are_cut_to_the_active_clients(active: int) -> None:
    A, gradient = normal(3, R, N), normal(3, M, R)
    found = projected({"w/A": A})({"w/B": gradient[:active]})["w/B"]
    for k in range(active):
        wanted = gradient[k] @ torch.linalg.inv(A[k] @ A[k].mT)
        torch.testing.assert_close(found[k], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("own", [False, True])
def test_a_budget_projects_on_its_own_rows(own: bool) -> None:
    ranks = torch.tensor([1, 2, 5])
    A = normal(*((3, R, N) if own else (R, N)))
    gradient = normal(3, M, R)
    found = projected({"w/A": A}, ranks=ranks)({"w/B": gradient})["w/B"]
    for k, rank in enumerate(ranks.tolist()):
        rows = (A[k] if own else A)[:rank]
        wanted = gradient[k, :, :rank] @ torch.linalg.inv(rows @ rows.mT)
        torch.testing.assert_close(found[k, :, :rank], wanted, rtol=1e-10, atol=1e-10)
        assert torch.count_nonzero(found[k, :, rank:]) == 0


def test_tensors_without_a_frozen_partner_keep_their_gradient() -> None:
    gradients = {"v/B": normal(1, M, R), "bias": normal(1, M), "w/A": normal(1, R, N)}
    kept = {n: g.clone() for n, g in gradients.items()}
    found = projected({"w/A": normal(R, N)})(gradients)
    assert list(found) == list(gradients)
    for name, gradient in kept.items():
        assert torch.equal(found[name], gradient)


def test_gradients_are_not_changed_in_place() -> None:
    gradients = {"w/B": normal(1, M, R)}
    kept = gradients["w/B"].clone()
    projected({"w/A": normal(R, N)})(gradients)
    assert torch.equal(gradients["w/B"], kept)


def test_a_sketch_that_lost_a_row_is_inverted_where_it_can_be() -> None:
    """A A^T is singular: the pseudo-inverse leaves the lost direction alone."""
    A = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = projected({"w/A": A})({"w/B": torch.ones(1, M, 2, dtype=torch.float64)})["w/B"]
    assert found[0, 0].tolist() == [0.25, 0.0]


def test_the_precision_of_the_factor_is_kept() -> None:
    found = projected({"w/A": normal(R, N).float()})({"w/B": normal(1, M, R).float()})
    assert found["w/B"].dtype == torch.float32


# ---- In messages ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [PLAIN, GRADIENT, Example(3), Example(3, {"w": 5}, ("w",))],
)
def test_a_message_holds_a_program_by_name_and_fields(program: ClientProgram) -> None:
    tensors, said = split(RoundInstructions(program=program))
    assert tensors == {}
    assert join(RoundInstructions, {}, json.loads(json.dumps(said))).program == program


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"is": "subprocess:Popen"}, "not known"),
        ({"is": "fedraclora.training.extras.prox:Prox", "mu": 1.0}, "not known"),
        ({"blocks": 3}, "not known"),
        ({"is": "example"}, "fields of Example"),
        ({"is": "example", "blocks": 3, "more": 1}, "fields of Example"),
        ({"is": "example", "blocks": "x"}, "program/blocks"),
        ({"is": "example", "blocks": 0}, "blocks=0"),
        (7, "program"),
    ],
)
def test_a_message_that_names_another_program_is_refused(said: object, words: str) -> None:
    before = {*sys.modules}
    with pytest.raises((ValueError, ConfigError), match=words):
        join(RoundInstructions, {}, {"program": said})
    assert {*sys.modules} == before


def test_a_program_without_a_name_of_its_own_cannot_be_sent() -> None:
    @dataclass(frozen=True)
    class Derived(Example):
        """It would be read as the class that it derives from."""

    with pytest.raises(ConfigError, match=r"Derived.*no name"):
        split(RoundInstructions(program=Derived(2)))


def test_a_name_of_another_program_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'example'.*taken by"):
        type("Other", (ClientProgram,), {"name": "example", "__module__": __name__})
    assert ClientProgram.known["example"] is Example


def test_a_client_process_knows_the_programs_of_the_method_that_its_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from fedraclora import ClientProgram\nclass P(ClientProgram):\n    name = 'of_mine'\n"
    (tmp_path / "of_mine.py").write_text(f"{text}class M:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ClientProgram, "known", dict(ClientProgram.known))
    know_programs({"method": {"name": "nowhere:M"}})  # it has none that clients need
    know_programs({"method": {"name": "of_mine:M"}})
    assert ClientProgram.known["of_mine"].__module__ == "of_mine"


def test_numbers_in_lists_are_counted_and_those_of_the_header_are_not() -> None:
    @dataclass(frozen=True)
    class Listed(ClientProgram):
        a: tuple[float, ...]
        b: list[list[int]]
        c: float = 1.0
        d: str = "text"

    assert Listed((0.5, 1.0), [[1, 2, 3], [4]]).payload_bytes == 6 * 8
    assert Example(2).payload_bytes == 0


def test_the_limits_of_a_method_hold_whatever_it_derives_from() -> None:
    @dataclass(frozen=True)
    class Bare(DirectionMethod):
        traits = Traits(exact=True, linear=True, merges=True)
        directions: Count = 1

    check_method(Bare())
    with pytest.raises(ConfigError, match=r"method.directions=0.*1 or more"):
        check_method(Bare(directions=0))
