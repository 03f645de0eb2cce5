"""Clients that are made on demand: what each holds depends on its id and on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.data import DATASETS, DataSet, hold_out, make_partition, select_labels
from fedraclora.data.clients import ClientData, count_labels
from fedraclora.data.partition import spread_clients
from fedraclora.data.partitioners import bootstrap
from fedraclora.data.samples import Samples
from fedraclora.data.sources.virtual import Mixture, virtual
from fedraclora.errors import ConfigError

MANY = 10**6
PLAIN = {"sizes": "constant", "alpha": None, "noise": 0.0, "shift": 0.0}
ROWS, CLASSES = 300, 4


def mixture(**change: object) -> Mixture:
    parts = virtual(**{"clients": MANY, "features": 6, "held_out": 5} | change).parts
    assert isinstance(parts, Mixture)
    return parts


def table(*, classes: bool = True) -> DataSet:
    """Input [row, row + 1] and a class that the row decides; class 2 has no rows."""
    rows = torch.arange(ROWS)
    labels = torch.tensor([0, 1, 1, 3])[rows % 4]
    samples = Samples({"x": torch.stack([rows, rows + 1], dim=1).double()}, labels)
    columns = {"label": labels.numpy()} if classes else {}
    return DataSet(samples, samples, CLASSES, "cross_entropy", ("accuracy",), columns, (2,))


def rows_of(samples: Samples) -> torch.Tensor:
    return samples.inputs["x"][:, 0].long()


MAKE: dict[str, Callable[[int], ClientData]] = {
    "mixture": lambda n: mixture(clients=n),
    "mixture in float64": lambda n: mixture(clients=n, dtype="float64"),
    "mixture without skew": lambda n: mixture(clients=n, alpha=None),
    "bootstrap": lambda n: bootstrap(table(), clients=n, seed=3, samples=20, alpha=0.5),
    "bootstrap of any rows": lambda n: bootstrap(table(), clients=n, seed=3, samples=20),
}


@cache
def of_many(name: str) -> ClientData:
    return MAKE[name](MANY)


ids = st.integers(0, MANY - 1)
made = pytest.mark.parametrize("name", MAKE)


@made
@given(st.lists(ids, min_size=1, max_size=5), st.lists(st.integers(0, 400), min_size=1, max_size=7))
def test_a_sample_does_not_depend_on_the_batch(
    name: str, clients: list[int], positions: list[int]
) -> None:
    data = of_many(name)
    everyone, places = torch.tensor(clients), torch.tensor(positions)
    # A place of its own for every client, as shuffles give them.
    wanted = (places + torch.arange(len(clients))[:, None]) % 401
    together = data.gather(everyone, wanted)
    assert len(together) == wanted.numel()
    sizes = data.sizes(everyone)
    for k, client in enumerate(clients):
        block = slice(k * len(positions), (k + 1) * len(positions))
        alone = data.gather(torch.tensor([client]), torch.arange(401)[None]).take(wanted[k])
        assert torch.equal(together.inputs["x"][block], alone.inputs["x"])
        assert torch.equal(together.target[block], alone.target)
        assert torch.equal(sizes[k : k + 1], data.sizes(torch.tensor([client])))


@made
def test_samples_and_clients_differ(name: str) -> None:
    data = of_many(name)
    one = data.gather(torch.tensor([5]), torch.arange(50)[None])
    other = data.gather(torch.tensor([6]), torch.arange(50)[None])
    assert len(one.inputs["x"].unique(dim=0)) > 40
    assert (one.inputs["x"] != other.inputs["x"]).any(dim=1).sum() > 40


@pytest.mark.parametrize("name", MAKE)
def test_a_larger_population_is_more_of_the_same_and_holds_no_more(name: str) -> None:
    def held(thing: object) -> int:
        if isinstance(thing, torch.Tensor):
            return thing.nbytes
        if isinstance(thing, dict):
            return sum(map(held, thing.values()))
        return sum(map(held, vars(thing).values())) if hasattr(thing, "__dict__") else 0

    few, many = MAKE[name](10), of_many(name)
    assert (few.num_clients, many.num_clients) == (10, MANY)
    assert held(few) == held(many) > 0
    batches = [p.gather(torch.arange(10), torch.arange(8).expand(10, -1)) for p in (few, many)]
    assert torch.equal(batches[0].inputs["x"], batches[1].inputs["x"])
    assert torch.equal(few.sizes(torch.arange(10)), many.sizes(torch.arange(10)))


# --- sizes ---------------------------------------------------------------------------------------


def sizes(**change: object) -> torch.Tensor:
    return mixture(samples=1000, **change).sizes(torch.arange(20_000)).double()


def test_constant_sizes_are_constant() -> None:
    assert set(sizes(sizes="constant", spread=3.0).tolist()) == {1000.0}
    assert set(sizes(sizes="lognormal", spread=0.0).tolist()) == {1000.0}


def test_log_normal_sizes_have_their_median_and_deviation() -> None:
    logs = sizes(sizes="lognormal", spread=0.5).log()
    # Deviations of the estimates: 0.5 * 1.25 / sqrt(20000) = 0.004, 0.5 / sqrt(40000) = 0.0025.
    assert float(logs.median()) == pytest.approx(np.log(1000), abs=0.02)
    assert float(logs.std()) == pytest.approx(0.5, abs=0.015)


def test_pareto_sizes_have_their_median_and_tail() -> None:
    drawn = sizes(sizes="pareto", spread=0.5)
    assert float(drawn.median()) == pytest.approx(1000, rel=0.03)
    assert float(drawn.min()) == pytest.approx(1000 / 2**0.5, rel=0.01)
    # P(size > s) = (least / s)^2: a share of 1 / 16 lies beyond 4 times the least.
    assert float((drawn > 4 * 707).double().mean()) == pytest.approx(1 / 16, abs=0.01)


def test_every_client_has_a_sample() -> None:
    assert float(mixture(samples=1, spread=2.0).sizes(torch.arange(5000)).min()) == 1


# --- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_mixes_of_classes_are_dirichlet(alpha: float) -> None:
    """Mean and variance of a share: 1/C, and (1/C)(1 - 1/C) / (C alpha + 1)."""
    data = mixture(classes=5, sizes="constant", samples=400, alpha=alpha)
    shares = count_labels(data, torch.arange(2000), 5) / 400
    assert shares.sum() == pytest.approx(2000)
    assert shares.mean(axis=0) == pytest.approx(np.full(5, 0.2), abs=0.03)
    of_mixes = 0.16 / (5 * alpha + 1)
    of_samples = (0.16 - of_mixes) / 400
    assert shares.var() == pytest.approx(of_mixes + of_samples, rel=0.1)


def test_without_skew_all_clients_have_all_classes_alike() -> None:
    counts = count_labels(mixture(**PLAIN, samples=1000), torch.arange(20), 10)
    # Each count is Binomial(1000, 0.1): six standard deviations are 57.
    assert abs(counts - 100).max() < 57


def test_a_bootstrap_keeps_the_shares_of_the_table() -> None:
    data = bootstrap(table(), clients=MANY, seed=0, samples=50, alpha=0.3)
    counts = count_labels(data, torch.arange(4000), CLASSES)
    assert counts.sum(axis=0) / counts.sum() == pytest.approx([0.25, 0.5, 0, 0.25], abs=0.03)
    assert (counts.max(axis=1) / 50).mean() > 0.7


def test_a_bootstrap_draws_each_row_with_its_class() -> None:
    wanted = table()
    for alpha in (None, 0.5):
        data = bootstrap(wanted, clients=MANY, seed=1, samples=20, alpha=alpha)
        drawn = data.gather(torch.arange(3000), torch.arange(20).expand(3000, -1))
        rows = rows_of(drawn)
        assert torch.equal(drawn.target, wanted.train.target[rows])
        counts = rows.bincount(minlength=ROWS).double()
        assert int(counts.min()) > 0
        if alpha is None:  # 60,000 draws of 300 rows: chi-square with 299 degrees of freedom
            assert float(((counts - 200) ** 2 / 200).sum()) < 299 + 5 * (2 * 299) ** 0.5


def test_a_bootstrap_knows_the_lengths_of_its_samples() -> None:
    mask = (torch.arange(6) < torch.tensor([[2], [5], [4]])).long()
    texts = Samples({"input_ids": mask, "attention_mask": mask}, torch.tensor([0, 1, 0]))
    data_set = replace(table(), train=texts, columns={"label": texts.target.numpy()})
    data = bootstrap(data_set, clients=50, seed=0, samples=9, alpha=1.0)
    clients, positions = torch.tensor([4, 7]), torch.arange(12).reshape(2, 2, 3)
    lengths = data.lengths(clients, positions)
    gathered = data.gather(clients, positions.reshape(2, 6))
    assert lengths is not None
    assert lengths.shape == positions.shape
    assert gathered.lengths is not None
    assert torch.equal(lengths.flatten(), gathered.lengths)


# --- features ------------------------------------------------------------------------------------


def test_without_noise_and_shift_samples_are_the_centres_of_their_class() -> None:
    data = mixture(**PLAIN, clouds=3, classes=4)
    batch = data.gather(torch.arange(40), torch.arange(30).expand(40, -1))
    for label in range(4):
        found = batch.inputs["x"][batch.target == label].unique(dim=0)
        centres = data.centres[3 * label : 3 * label + 3]
        assert torch.equal(found, centres.unique(dim=0))


def test_a_shift_moves_all_samples_of_a_client_alike() -> None:
    """Shifts are s_k / norm, and norm^2 = 1 + 0.75^2 without noise."""
    still = mixture(**PLAIN)
    clients, positions = torch.arange(4000), torch.arange(3).expand(4000, -1)
    norm = (1 + 0.75**2) ** 0.5
    moved = mixture(**PLAIN | {"shift": 0.75}).gather(clients, positions).inputs["x"]
    plain = still.gather(clients, positions).inputs["x"] / norm
    shifts = (moved - plain).reshape(4000, 3, -1)
    torch.testing.assert_close(shifts, shifts[:, :1].expand_as(shifts), rtol=0, atol=1e-6)
    assert float(shifts[:, 0].std()) == pytest.approx(0.75 / norm, rel=0.03)


def test_features_have_variance_one_and_noise_its_deviation() -> None:
    data = mixture(noise=2.0, shift=1.0, features=64)
    clients, positions = torch.arange(5000), torch.arange(2).expand(5000, -1)
    x = data.gather(clients, positions).inputs["x"]
    assert float(x.square().mean()) == pytest.approx(1, rel=0.05)
    plain = replace(data, noise=0.0).gather(clients, positions).inputs["x"]
    noise = (x - plain).double() * (1 + 4 + 1) ** 0.5
    assert float(noise.std()) == pytest.approx(2, rel=0.01)
    assert float((noise**4).mean() / noise.var() ** 2) == pytest.approx(3, rel=0.03)  # of a normal
    pairs = noise[0::2] * noise[1::2]  # of two samples of one client
    assert abs(float(pairs.mean())) < 0.05


def test_a_precision_is_that_of_the_samples() -> None:
    assert mixture().gather(torch.arange(2), torch.zeros(2, 1).long()).inputs["x"].dtype == (
        torch.float32
    )
    wide = mixture().to("cpu", torch.float64)
    batch = wide.gather(torch.arange(2), torch.zeros(2, 1).long())
    assert batch.inputs["x"].dtype == torch.float64
    assert batch.target.dtype == torch.int64
    moved = of_many("bootstrap").to("cpu", torch.float32)
    assert moved.gather(torch.arange(2), torch.zeros(2, 1).long()).inputs["x"].dtype == (
        torch.float32
    )


# --- the data set --------------------------------------------------------------------------------


def test_tables_are_of_clients_who_never_train() -> None:
    data = DATASETS["virtual"](clients=50, held_out=400, features=8)
    first = data.parts.gather(torch.arange(50), torch.zeros(50, 1).long()).inputs["x"]
    both = torch.cat([data.train.inputs["x"], data.test.inputs["x"]])
    assert len(both.unique(dim=0)) == 800
    assert not (first[:, None] == both).all(dim=2).any()
    # Their classes are those of the population: Binomial(800, 0.1), six deviations are 51.
    counts = torch.cat([data.train.target, data.test.target]).bincount(minlength=10)
    assert int((counts - 80).abs().max()) < 51


def test_the_problem_is_its_seed() -> None:
    one, two, other = (virtual(clients=9, held_out=20, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.test.inputs["x"], two.test.inputs["x"])
    assert not torch.equal(one.test.target, other.test.target)


def test_the_clients_are_given() -> None:
    data = virtual(clients=MANY)
    parts, info = make_partition(data, name="given", clients=MANY, seed=0)
    assert parts is data.parts
    assert (info["clients"], info["clients_asked"], info["clients_dropped"]) == (MANY, MANY, 0)
    assert info["samples_median"] == pytest.approx(50, abs=4)
    with pytest.raises(ConfigError, match=r"clients=7, .*1000000 clients"):
        make_partition(data, name="given", clients=7, seed=0)


def test_validation_samples_are_taken_from_the_table_alone() -> None:
    data = virtual(clients=MANY, held_out=100)
    rest, held = hold_out(data, 0.2, seed=0)
    assert held is not None
    assert len(rest.train) + len(held) == 100
    assert rest.parts is data.parts


def test_labels_of_clients_on_demand_cannot_be_selected() -> None:
    with pytest.raises(ConfigError, match=r"on demand.*data\.labels=null"):
        select_labels(virtual(clients=3), [0, 1])


def test_any_number_of_clients_over_one_table() -> None:
    parts, info = make_partition(
        table(), name="bootstrap", clients=MANY, seed=0, samples=30, alpha=0.5, sizes="lognormal",
        spread=0.4,
    )  # fmt: skip
    assert info["clients"] == MANY == parts.num_clients
    again, _ = make_partition(table(), name="bootstrap", clients=9, seed=1, samples=30, alpha=0.5)
    places = torch.arange(30)[None]
    one, other = (rows_of(p.gather(torch.tensor([4]), places)) for p in (parts, again))
    assert not torch.equal(one, other)  # another seed


def test_clients_to_look_at_are_spread_over_the_population() -> None:
    assert spread_clients(5, 1000).tolist() == [0, 1, 2, 3, 4]
    assert spread_clients(1, 1000).tolist() == [0]
    shown = spread_clients(MANY, 1000)
    assert len(shown.unique()) == 1000
    assert (int(shown[0]), int(shown[-1])) == (0, MANY - 1)


BAD = {
    "clients": ({"clients": 0}, "clients=0"),
    "clients null": ({"clients": None}, "clients=None"),
    "samples": ({"samples": 0}, "data.samples=0"),
    "sizes": ({"sizes": "normal"}, "unknown data.sizes 'normal'.*constant, lognormal, pareto"),
    "spread": ({"spread": -0.1}, "data.spread=-0.1"),
    "features": ({"features": 0}, "data.features=0"),
    "classes": ({"classes": 1}, "data.classes=1: expected 2 or more"),
    "clouds": ({"clouds": 0}, "data.clouds=0"),
    "noise": ({"noise": float("inf")}, "data.noise=inf"),
    "shift": ({"shift": -1}, "data.shift=-1"),
    "alpha": ({"alpha": 0.0}, "data.alpha=0.0: expected a positive"),
    "held_out": ({"held_out": 0}, "data.held_out=0"),
    "dtype": ({"dtype": "bfloat16"}, "unknown data.dtype 'bfloat16'"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_bad_input_names_the_key(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        virtual(**{"clients": 5} | change)


@pytest.mark.parametrize("change", [{"samples": 0}, {"alpha": -1.0}, {"sizes": "x"}])
def test_bad_input_of_a_bootstrap_names_the_key(change: dict[str, object]) -> None:
    key, value = next(iter(change.items()))
    with pytest.raises(ConfigError, match=rf"partition.{key}.*{value}"):
        bootstrap(table(), **{"clients": 5, "seed": 0, "samples": 9} | change)


def test_a_skew_by_class_needs_classes() -> None:
    with pytest.raises(ConfigError, match="has no classes"):
        bootstrap(table(classes=False), clients=5, seed=0, samples=9, alpha=1.0)
    assert (
        bootstrap(table(classes=False), clients=5, seed=0, samples=9, alpha=None).num_clients == 5
    )
