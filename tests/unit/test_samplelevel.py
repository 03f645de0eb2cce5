"""Sample-level noise: sensitivity, statistics and account."""

from __future__ import annotations

import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.errors import ConfigError
from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.schema import build
from fedraclora.training.localconfig import LocalConfig
from strategies.server.account import SampleAccount

VALID = torch.tensor([[True, True, True], [True, True, False]])


def normals(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own(seed: int) -> dict[str, torch.Tensor]:
    """Gradients of 2 x 3 samples for two tensors."""
    return {"w/B": normals(seed, 6, 4, 2), "b": normals(seed + 1, 6, 4)}


def silence() -> dict[str, torch.Tensor]:
    return {"w/B": torch.zeros(2, 4, 2).double(), "b": torch.zeros(2, 4).double()}


def flat(tree: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten(1) for t in tree.values()], dim=1)


@given(seed=st.integers(0, 10**6), place=st.integers(0, 4), clip=st.floats(0.01, 100.0))
def test_a_sample_moves_the_sum_by_no_more_than_the_clip(
    seed: int, place: int, clip: float
) -> None:
    dp, gradients = SampleNoise(clip, 0.0), own(seed)
    fewer = VALID.clone()
    gone = {name: t.clone() for name, t in gradients.items()}
    for tensor in gone.values():
        tensor[place] = 0.0
    wide, narrow = (flat(dp.gradients(g, fewer, silence())) for g in (gradients, gone))
    count = VALID.sum(dim=1)
    moved = ((wide - narrow) * count[:, None]).norm(dim=1)
    norm = float(flat(gradients)[place].norm())
    assert float(moved[place // 3]) == pytest.approx(min(norm, clip), rel=1e-9)
    assert float(moved[1 - place // 3]) == 0.0


def test_clipping_by_hand() -> None:
    """Two samples of norms 5 and 0.5, clip 1: 1/5 of the first and all of the second."""
    gradients = {"b": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}
    found = SampleNoise(1.0, 0.0).gradients(
        gradients, torch.ones(1, 2, dtype=torch.bool), {"b": torch.zeros(1, 2)}
    )
    assert found["b"].tolist() == [pytest.approx([(0.6 + 0.3) / 2, (0.8 + 0.4) / 2])]


def test_padding_counts_for_nothing() -> None:
    dp, gradients = SampleNoise(0.7, 0.0), own(3)
    found = flat(dp.gradients(gradients, VALID, silence()))
    for tensor in gradients.values():
        tensor[5] = 1e6
    assert torch.equal(flat(dp.gradients(gradients, VALID, silence())), found)


def test_noise_is_of_the_clip_over_the_batch() -> None:
    dp = SampleNoise(0.4, 1.5)
    like = {"b": torch.zeros(2, 50_000).double()}
    noise = dp.noise(like, torch.tensor([3, 8]), 5, 2, 1)
    zero = {"b": torch.zeros(6, 50_000).double()}
    deviations = dp.gradients(zero, VALID, noise)["b"].std(dim=1)
    torch.testing.assert_close(
        deviations, torch.tensor([0.6 / 3, 0.6 / 2]).double(), rtol=0.02, atol=0
    )
    assert abs(float(torch.corrcoef(noise["b"])[0, 1])) < 0.02
    alone = dp.noise({"b": like["b"][1:]}, torch.tensor([8]), 5, 2, 1)
    assert torch.equal(alone["b"][0], noise["b"][1])
    for other in ((6, 2, 1), (5, 3, 1), (5, 2, 2)):
        assert not torch.equal(dp.noise(like, torch.tensor([3, 8]), *other)["b"], noise["b"])
    assert not any(
        t.any() for t in SampleNoise(1, 0).noise(like, torch.arange(2), 0, 1, 0).values()
    )


def test_epsilon_is_the_librarys_for_one_release_a_pass() -> None:
    accountant = RdpAccountant()
    accountant.compose(dp_event.GaussianDpEvent(1.3), 12)
    assert SampleNoise(1.0, 1.3).epsilon(12) == pytest.approx(accountant.get_epsilon(1e-5))


@pytest.mark.parametrize(
    ("local", "wanted"),
    [
        (LocalConfig(epochs=3, batch_size=4), [3, 3, 6]),
        (LocalConfig(steps=5, batch_size=4), [2, 1, 10]),  # passes of 3, 8 and 1 steps
        (LocalConfig(steps=5, batch_size=0), [5, 5, 10]),
    ],
)
def test_passes_are_counted(local: LocalConfig, wanted: list[int]) -> None:
    sizes = torch.tensor([10, 30, 2])
    account = SampleAccount(
        SampleNoise(), local, sizes.__getitem__, torch.zeros(3, dtype=torch.int64)
    )
    account.add(torch.tensor([0, 2]))
    account.add(torch.tensor([1, 2]))
    assert account.passes.tolist() == wanted
    assert account.row() == {
        "epsilon": SampleNoise().epsilon(max(wanted)),
        "delta": 1e-5,
        "passes": max(wanted),
    }


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"name": "gaussian", "clip": 0.0}, r"local\.dp\.clip is 0\.0"),
        ({"name": "gaussian", "noise_multiplier": -1.0}, r"local\.dp\.noise_multiplier is -1\.0"),
        ({"name": "gaussian", "delta": 1.0}, r"local\.dp\.delta is 1\.0"),
        ({"name": "laplace"}, r"unknown local\.dp 'laplace'"),
    ],
)
def test_impossible_settings_are_refused(group: dict[str, object], words: str) -> None:
    whole = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5} | group
    with pytest.raises(ConfigError, match=words):
        build("local", LocalConfig, {"dp": whole})
