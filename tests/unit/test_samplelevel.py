"""Sample-level noise: sensitivity, statistics and account."""

from __future__ import annotations

import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.binding import build
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError
from fedraclora.privacy.sample_level import SampleNoise, answer_keys, seed_key
from fedraclora.protocol.link import Plan
from fedraclora.protocol.method import State
from fedraclora.strategies.server.device_simulator import DeviceSimulator
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.server.round_step import RunContext
from fedraclora.strategies.steps.local import SampleAccount
from fedraclora.training.extras.settings import LocalSettings
from tests.contract.worlds import make_method

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


def keys_of(*clients: int, seed: int = 5, round_: int = 2) -> list[bytes]:
    return answer_keys(seed_key(seed), round_, torch.tensor(clients))


def test_noise_is_of_the_clip_over_the_batch() -> None:
    dp = SampleNoise(0.4, 1.5)
    like = {"b": torch.zeros(2, 50_000).double()}
    noise = dp.noise(like, keys_of(3, 8), 1)
    zero = {"b": torch.zeros(6, 50_000).double()}
    deviations = dp.gradients(zero, VALID, noise)["b"].std(dim=1)
    torch.testing.assert_close(
        deviations, torch.tensor([0.6 / 3, 0.6 / 2]).double(), rtol=0.02, atol=0
    )
    assert abs(float(torch.corrcoef(noise["b"])[0, 1])) < 0.02
    assert not any(t.any() for t in SampleNoise(1, 0).noise(like, keys_of(0, 1), 0).values())


def test_noise_is_of_the_client_the_round_the_step_and_the_tensor_alone() -> None:
    """Whoever else is in the batch, and however many: what a client adds is the same."""
    dp = SampleNoise()
    like = {"b": torch.zeros(2, 7, 3), "w/B": torch.zeros(2, 21)}
    noise = dp.noise(like, keys_of(3, 8), 1)
    alone = dp.noise({n: t[1:] for n, t in like.items()}, keys_of(8), 1)
    for name, drawn in noise.items():
        assert drawn.dtype == torch.float64
        assert torch.equal(alone[name][0], drawn[1])
    assert not torch.equal(noise["b"].flatten(1), noise["w/B"])
    others = [dp.noise(like, keys, step)["b"] for keys, step in (
        (keys_of(3, 8, seed=6), 1), (keys_of(3, 8, round_=3), 1), (keys_of(3, 8), 2)
    )]  # fmt: skip
    assert not any(bool((other == noise["b"]).any()) for other in others)


def test_noise_is_no_grid_of_32_bits() -> None:
    """Of 2^32 values a number, 300,000 draws would hit some ten twice."""
    drawn = SampleNoise().noise({"b": torch.zeros(1, 300_000)}, keys_of(1), 0)["b"]
    assert drawn.unique().numel() == drawn.numel()
    assert abs(float(drawn.mean())) < 0.01
    assert abs(float(drawn.std()) - 1) < 0.01
    assert abs(float((drawn.abs() > 1.959964).double().mean()) - 0.05) < 0.003


def test_noise_is_added_before_the_sum_is_rounded() -> None:
    """The gradients are 1e4 times the noise: what comes is the sum of both, rounded once."""
    dp = SampleNoise(1e4, 1e-4)
    gradients = {"b": torch.full((1, 1000), 300.0)}
    noise = dp.noise({"b": torch.zeros(1, 1000)}, keys_of(1), 0)
    found = dp.gradients(gradients, torch.ones(1, 1, dtype=torch.bool), noise)["b"]
    share = 1e4 / torch.linalg.vector_norm(gradients["b"]).clamp(min=1e4)
    wanted = (gradients["b"] * share).double() + noise["b"]
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted.float())


def test_epsilon_is_the_librarys_for_one_release_a_pass() -> None:
    accountant = RdpAccountant()
    accountant.compose(dp_event.GaussianDpEvent(1.3), 12)
    assert SampleNoise(1.0, 1.3).epsilon(12) == pytest.approx(accountant.get_epsilon(1e-5))


@pytest.mark.parametrize(
    ("local", "wanted"),
    [
        (LocalSettings(lr=0.5, epochs=3, batch_size=4), [3, 3, 6]),
        (LocalSettings(lr=0.5, steps=5, batch_size=4), [2, 1, 10]),  # passes of 3, 8 and 1 steps
        (LocalSettings(lr=0.5, steps=5, batch_size=0), [5, 5, 10]),
    ],
)
def test_passes_are_counted(local: LocalSettings, wanted: list[int]) -> None:
    sizes = torch.tensor([10, 30, 2])
    account, loop = SampleAccount(SampleNoise()), LoopConfig(9, 3, 2, 2, 1)
    method, devices = make_method("fedavg"), DeviceSimulator(SystemConfig(), 1, local)
    account.run = RunContext(method, local, loop, devices, sizes.__getitem__)
    account.begin(State({}, Plan({})))
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
        ({"name": "gaussian", "clip": 0.0}, r"local\.dp\.clip=0\.0"),
        ({"name": "gaussian", "noise_multiplier": -1.0}, r"local\.dp\.noise_multiplier=-1\.0"),
        ({"name": "gaussian", "delta": 1.0}, r"local\.dp\.delta=1\.0"),
        ({"name": "laplace"}, r"unknown local\.dp 'laplace'"),
    ],
)
def test_impossible_settings_are_refused(group: dict[str, object], words: str) -> None:
    whole = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5} | group
    with pytest.raises(ConfigError, match=words):
        build("local", LocalSettings, {"dp": whole})
