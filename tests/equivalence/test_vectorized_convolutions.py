"""A batch of clients comes to what each comes to alone: convolutions of every shape."""

from __future__ import annotations

import pytest
from vectorized_agreement import KINDS, LOCAL, method_of, run
from vectorized_cases import Case, convolution
from vectorized_settings import ALSO, WIDELY

from fedraclora.errors import ModelError

CONVOLUTIONS: dict[str, dict[str, object]] = {
    "stride": {"stride": (2, 1), "padding": 1},
    "oblong": {"kernel_size": (3, 2), "dilation": (1, 2), "padding": (0, 1)},
    "same": {"padding": "same", "bias": False},
    "point": {"kernel_size": 1},
}


@pytest.mark.short(when=lambda name, shape: name in WIDELY or (name in ALSO and shape == "oblong"))
@pytest.mark.parametrize("shape", CONVOLUTIONS)
@pytest.mark.parametrize("name", KINDS)
def test_convolutions_of_every_shape(name: str, shape: str) -> None:
    run(Case(convolution(**CONVOLUTIONS[shape]), targets="all"), method_of(name), LOCAL, 2, {2})


def test_a_grouped_convolution_is_trained_in_full() -> None:
    case = Case(convolution(groups=2), dense="0")
    run(case, method_of("fed_rac_lora"), LOCAL, rounds=2, check={2})


@pytest.mark.short(when=lambda name, rank: name in WIDELY or (name in ALSO and rank == 4))
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rank", [3, 4])  # 4: two groups of 2, so that shapes fit by chance
@pytest.mark.parametrize("unusual", [{"groups": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_an_unusual_convolution_is_right_or_refused(
    unusual: dict[str, object], rank: int, name: str
) -> None:
    case = Case(convolution(**unusual), targets="all")
    refused = ""
    try:
        run(case, method_of(name, rank=rank), LOCAL, rounds=1, check={1})
    except ModelError as error:
        refused = str(error)
    assert not refused or "Conv2d" in refused
