"""Noise, coins and clips: their statistics, and what they cost by the library's own figures."""

from __future__ import annotations

import math
import stat
from pathlib import Path

import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant

from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.privacy.accountant import epsilon, noise_for
from fedraclora.privacy.client_level import ClientLevel, Mechanism
from fedraclora.privacy.secret import KEY_FILE, Secret, stream
from tests.common import accepted

KEY = bytes(range(32))
DELTA = 1e-5


def library(noise: float, sampling: float, rounds: int) -> float:
    """Epsilon as the library is meant to be used, one composition per round."""
    accountant = RdpAccountant()
    for _ in range(rounds):
        accountant.compose(
            dp_event.PoissonSampledDpEvent(sampling, dp_event.GaussianDpEvent(noise))
        )
    return float(accountant.get_epsilon(DELTA))


# --- the account ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "sampling", "rounds"), [(1.1, 0.1, 7), (0.7, 0.02, 12)])
def test_epsilon_is_the_librarys(noise: float, sampling: float, rounds: int) -> None:
    wanted = library(noise, sampling, rounds)
    assert epsilon(noise, sampling, rounds, DELTA) == pytest.approx(wanted, rel=1e-12)
    mechanism = ClientLevel(noise_multiplier=noise).settle(1000, round(1000 * sampling), rounds)
    assert mechanism.epsilon(rounds) == pytest.approx(wanted, rel=1e-12)


def test_all_clients_every_round_is_the_plain_gaussian() -> None:
    accountant = RdpAccountant()
    accountant.compose(dp_event.GaussianDpEvent(2.0), 5)
    assert epsilon(2.0, 1.0, 5, DELTA) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-12)


@pytest.mark.slow
def test_a_target_is_spent_and_not_overspent() -> None:
    config = ClientLevel(target_epsilon=3.0, noise_multiplier=None)
    mechanism = config.settle(1000, 100, 10)
    assert 2.99 < library(mechanism.noise, 0.1, 10) <= 3.0 + 1e-3
    assert mechanism.update_noise == mechanism.noise == noise_for(3.0, 0.1, 10, DELTA)
    assert mechanism.epsilon(5) < 3.0
    with pytest.raises(ConfigError, match=r"1000 rounds .*epsilon 1e-06"):
        noise_for(1e-6, 1.0, 1000, 1e-9)


def test_adaptive_clipping_pays_for_its_count() -> None:
    """Two Gaussian releases of multipliers a and b are one of (a^-2 + b^-2)^-1/2."""
    mechanism = ClientLevel(noise_multiplier=1.0, quantile=0.5, count_noise=2.0).settle(100, 20, 9)
    assert mechanism.update_noise > 1.0
    joint = (mechanism.update_noise**-2 + (2 * 2.0) ** -2) ** -0.5
    assert joint == pytest.approx(1.0, rel=1e-12)
    accountant = RdpAccountant()
    both = [dp_event.GaussianDpEvent(mechanism.update_noise), dp_event.GaussianDpEvent(4.0)]
    accountant.compose(dp_event.ComposedDpEvent(both), 9)
    one = ClientLevel(noise_multiplier=1.0).settle(100, 100, 9)
    assert one.epsilon(9) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)
    with pytest.raises(ConfigError, match=r"privacy\.count_noise=0\.5"):
        ClientLevel(noise_multiplier=1.0, quantile=0.5, count_noise=0.5).settle(100, 20, 9)


def test_the_clip_follows_its_quantile() -> None:
    config = ClientLevel(quantile=0.5, clip_rate=0.3)
    assert config.next_clip(2.0, 10, 20) == 2.0
    assert config.next_clip(2.0, 20, 20) == pytest.approx(2.0 * math.exp(-0.15))
    assert config.next_clip(2.0, -50, 20) == pytest.approx(2.0 * math.exp(0.15))
    assert ClientLevel().next_clip(2.0, 20, 20) == 2.0
    norms, clip = torch.linspace(0.1, 5, 50), 0.2
    for _ in range(200):
        clip = config.next_clip(clip, int((norms < clip).sum()), 50)
    assert clip == pytest.approx(float(norms.median()), rel=0.1)


# --- draws ---------------------------------------------------------------------------------------


def test_noise_has_the_deviation_that_it_says() -> None:
    mechanism, total = Mechanism(0.1, 10, 1.5, 1.5, DELTA), torch.linspace(-1, 1, 200_000).double()
    noise = mechanism.noisy_sum(total, 0.4, Secret(KEY), 3) - total
    assert float(noise.std()) == pytest.approx(0.6, rel=0.01)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.006)
    within = [float((noise.abs() < k * 0.6).double().mean()) for k in (1, 2, 3)]
    assert within == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.004)
    count = Mechanism(0.1, 10, 1.5, 1.5, DELTA, 2.0)
    drawn = torch.tensor([count.noisy_count(3, 8, Secret(KEY), t) for t in range(4000)]).double()
    assert float(drawn.mean()) == pytest.approx(3 - 4 + 5, abs=0.1)
    assert float(drawn.std()) == pytest.approx(2.0, rel=0.05)


def test_noise_is_a_function_of_key_round_and_sum() -> None:
    mechanism, total = Mechanism(0.1, 10, 1.0, 1.0, DELTA), torch.ones(1000).double()

    def noise(key: bytes = KEY, round_: int = 3, moved: float = 0.0) -> torch.Tensor:
        moved_total = total + moved
        return mechanism.noisy_sum(moved_total, 1.0, Secret(key), round_) - moved_total

    assert torch.equal(noise(), noise())
    others = [noise(bytes(32)), noise(round_=4), noise(moved=2.0**-40)]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([noise(), other]))[0, 1])) < 0.12


def test_every_client_has_its_own_coin() -> None:
    mechanism = Mechanism(0.2, 20, 1.0, 1.0, DELTA)
    drawn = [mechanism.sample(Secret(KEY), t, 100) for t in range(400)]
    taken = torch.stack([torch.bincount(d, minlength=100) for d in drawn]).double()
    assert float(taken.mean()) == pytest.approx(0.2, abs=0.006)
    assert float(taken.mean(dim=0).min()) > 0.12
    assert float(taken.mean(dim=0).max()) < 0.28
    # The number of clients varies as it does for independent coins.
    assert float(taken.sum(dim=1).var()) == pytest.approx(100 * 0.2 * 0.8, rel=0.25)
    assert torch.equal(drawn[7], mechanism.sample(Secret(KEY), 7, 100))
    assert not torch.equal(drawn[7], mechanism.sample(Secret(bytes(32)), 7, 100))
    assert mechanism.sample(Secret(KEY), 1, 100).tolist() == sorted(set(drawn[1].tolist()))
    assert torch.equal(Mechanism(1.0, 9, 1, 1, DELTA).sample(Secret(KEY), 1, 9), torch.arange(9))


def test_the_stream_is_chacha20() -> None:
    """Key and nonce of zeros, block 0: the first test vector of RFC 8439, appendix A.1."""
    wanted = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    assert stream(bytes(32), 32).hex() == wanted


# --- the key -------------------------------------------------------------------------------------


def test_the_key_is_its_owners_and_stays(tmp_path: Path) -> None:
    first = Secret.of_folder(tmp_path, resume=False)
    path = tmp_path / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = Secret.of_folder(tmp_path, resume=True)
    assert torch.equal(first.normals(9, "a", 1), again.normals(9, "a", 1))
    other = Secret.of_folder(tmp_path / "other", resume=False)
    assert not torch.equal(first.normals(9, "a", 1), other.normals(9, "a", 1))
    path.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="holds 5 bytes"):
        Secret.of_folder(tmp_path, resume=True)
    path.unlink()
    with pytest.raises(CheckpointError, match="without its key"):
        Secret.of_folder(tmp_path, resume=True)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": 0.0}, "privacy.clip=0.0"),
        ({"noise_multiplier": -1.0}, "privacy.noise_multiplier=-1.0"),
        ({"delta": 1.0}, "privacy.delta=1.0"),
        ({"quantile": 0.0}, "privacy.quantile=0.0"),
        ({"clip_rate": 0.3}, r"privacy\.clip_rate.*0\.3.*no effect.*privacy\.quantile"),
        ({"count_noise": 2.0}, r"privacy\.count_noise.*2\.0.*no effect.*privacy\.quantile"),
        ({"noise_multiplier": None}, r"noise_multiplier or privacy\.target_epsilon"),
        ({"target_epsilon": 1.0}, "and not both"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, float | None], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        accepted("privacy", ClientLevel(**{"noise_multiplier": 1.0} | changes))  # type: ignore[arg-type]


def test_a_delta_that_gives_a_client_away_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"200 clients less than 0\.005"):
        ClientLevel(noise_multiplier=1.0, delta=0.005).settle(200, 20, 5)
