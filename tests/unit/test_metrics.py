from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference
from torch import nn

from fedraclora.data.samples import Samples
from fedraclora.data.task import LOSSES
from fedraclora.errors import ConfigError, DataError, ShapeError
from fedraclora.evaluation.evaluate import METRICS, evaluate, state_of
from fedraclora.evaluation.metrics import Measure, RowOwners, higher_is_better
from fedraclora.rng import generator, torch_normal

torch.set_num_threads(1)


class Table(nn.Module):
    """Gives the rows of a table: the outputs are chosen by the test."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x]


def measure(
    outputs: torch.Tensor, target: torch.Tensor, loss: str, *names: str, batch_size: int = 7
) -> dict[str, float]:
    model = Table(torch.zeros_like(outputs))
    samples = Samples({"x": torch.arange(len(target))}, target)
    return evaluate(model, {"table": outputs}, samples, loss, names, batch_size)


def classes(seed: int, samples: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(seed, "test metrics")
    return torch_normal(rng, samples, width), torch.from_numpy(rng.integers(0, width, samples))


@given(seed=st.integers(0, 99), samples=st.integers(2, 40), width=st.integers(2, 5))
def test_class_metrics_are_those_of_scikit_learn(seed: int, samples: int, width: int) -> None:
    logits, target = classes(seed, samples, width)
    target[:2] = torch.tensor([0, 1])  # one class alone makes scikit-learn warn
    predicted = logits.argmax(dim=1)
    got = measure(logits, target, "cross_entropy", "accuracy", "matthews", "f1", "loss")
    average = "binary" if width == 2 else "macro"
    assert got["accuracy"] == reference.accuracy_score(target, predicted)
    assert got["matthews"] == pytest.approx(reference.matthews_corrcoef(target, predicted))
    wanted = reference.f1_score(target, predicted, average=average, zero_division=0.0)
    assert got["f1"] == pytest.approx(wanted)
    assert got["loss"] == pytest.approx(float(F.cross_entropy(logits, target)), rel=1e-12)


@given(seed=st.integers(0, 99), batch_size=st.integers(1, 50))
def test_the_batch_size_does_not_matter(seed: int, batch_size: int) -> None:
    logits, target = classes(seed, 31, 4)
    names = ("accuracy", "loss", "matthews", "f1", "perplexity")
    one = measure(logits, target, "cross_entropy", *names, batch_size=31)
    assert measure(logits, target, "cross_entropy", *names, batch_size=batch_size) == pytest.approx(
        one, rel=1e-12
    )


@pytest.mark.parametrize("columns", [(), (1,)])
def test_correlations_are_those_of_scipy(columns: tuple[int, ...]) -> None:
    rng = generator(1, "test metrics")
    scores, target = torch_normal(rng, 23, *columns), torch_normal(rng, 23)
    target += 0.5 * scores.reshape(-1)
    pair = (scores.reshape(-1).numpy(), target.numpy())
    got = measure(scores, target, "squared_error", "pearson", "spearman", "loss")
    assert got["pearson"] == pytest.approx(stats.pearsonr(*pair).statistic, rel=1e-12)
    assert got["spearman"] == pytest.approx(stats.spearmanr(*pair).statistic, rel=1e-12)
    assert got["loss"] == pytest.approx(0.5 * np.square(pair[0] - pair[1]).mean(), rel=1e-12)


@pytest.mark.parametrize("columns", [(), (1,)])
def test_a_logistic_score_is_cut_at_zero(columns: tuple[int, ...]) -> None:
    scores = torch.tensor([0.1, -2.0, 0.0, 3.0, -0.1]).reshape(5, *columns)
    target = torch.tensor([1, 0, 1, 0, 1])
    got = measure(scores, target, "logistic", "accuracy", "f1", "matthews", "pearson")
    predicted = [1, 0, 0, 1, 0]
    assert got["accuracy"] == 2 / 5
    assert got["f1"] == pytest.approx(reference.f1_score(target, predicted))
    assert got["matthews"] == pytest.approx(reference.matthews_corrcoef(target, predicted))
    assert got["pearson"] == pytest.approx(stats.pearsonr(scores.reshape(-1), target).statistic)


def test_token_metrics_count_tokens_that_have_a_target() -> None:
    logits = torch_normal(generator(2, "test metrics"), 9, 6, 5)
    target = torch.from_numpy(generator(3, "test metrics").integers(0, 5, (9, 6)))
    target[:, 4:] = -100
    target[3] = -100  # a sample without any token
    shifted, wanted = logits[:, :-1].reshape(-1, 5), target[:, 1:].reshape(-1)
    loss = float(F.cross_entropy(shifted, wanted, ignore_index=-100))
    kept = wanted != -100
    got = measure(logits, target, "next_token", "loss", "perplexity", "accuracy", "f1")
    assert got["loss"] == pytest.approx(loss, rel=1e-12)
    assert got["perplexity"] == pytest.approx(math.exp(loss), rel=1e-12)
    predicted = shifted.argmax(dim=1)[kept]
    assert got["accuracy"] == float((predicted == wanted[kept]).double().mean())
    assert got["f1"] == pytest.approx(
        reference.f1_score(wanted[kept], predicted, average="macro", zero_division=0.0)
    )


def test_f1_leaves_out_classes_that_neither_occur_nor_were_predicted() -> None:
    logits, target = classes(11, 12, 9)
    logits[:, 4:7], target[target > 4] = -9.0, 8  # 5 and 6 are nowhere, 8 was never predicted
    predicted = logits[:, :7].argmax(dim=1)
    logits[:, 7:] = -9.0
    assert {*predicted.tolist(), *target.tolist()} < {*range(9)}
    found = measure(logits, target, "cross_entropy", "f1")["f1"]
    wanted = reference.f1_score(target, predicted, average="macro", zero_division=0.0)
    assert found == pytest.approx(wanted)
    of_torch = torchmetrics.F1Score(task="multiclass", num_classes=9, average="macro")
    assert found == pytest.approx(float(of_torch(predicted, target)))


OWNED = {
    "cross_entropy": ("accuracy", "f1", "matthews", "loss", "perplexity"),
    "logistic": ("accuracy", "auc", "spearman", "loss"),
    "multi_label": ("f1_micro", "f1_macro", "auc", "loss"),
    "next_token": ("accuracy", "f1", "loss"),
    "pixel_classes": ("mean_iou", "accuracy", "loss"),
}


def owned_case(loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(8, "owned", loss)
    shape = {"next_token": (30, 6, 4), "pixel_classes": (30, 4, 2, 3), "logistic": (30, 1)}
    output = torch_normal(rng, *shape.get(loss, (30, 4))).double()
    if loss == "multi_label":
        return output, torch.from_numpy(rng.integers(0, 2, (30, 4))).double()
    sizes = {"next_token": (30, 6), "pixel_classes": (30, 2, 3)}.get(loss, (30,))
    target = torch.from_numpy(rng.integers(0, 2 if loss == "logistic" else 4, sizes))
    if len(sizes) > 1:
        target[:, -1] = -100
    return output, target


@pytest.mark.parametrize("loss", OWNED)
def test_one_pass_measures_each_owner_as_alone_and_all_as_pooled(loss: str) -> None:
    output, target = owned_case(loss)
    of = torch.from_numpy(generator(9, "owners").integers(0, 3, 30))
    of[of == 1] = 3  # one has no sample
    samples = Samples({"x": torch.arange(30)}, target)
    measure = Measure.of(OWNED[loss], loss)
    given = Table(output), {"table": output}, samples, measure, 7
    state = state_of(*given, RowOwners(4, of))
    values = measure.values(state, 4)
    for owner in (0, 2, 3):
        rows = of == owner
        assert values[owner] == pytest.approx(
            measure_rows(output[rows], target[rows], loss), rel=1e-12
        )
    assert math.isnan(values[1]["loss"])
    whole = measure_rows(output, target, loss)
    assert measure.values(measure.pooled(state))[0] == pytest.approx(whole, rel=1e-12)
    halves = [
        state_of(*given[:2], samples.take(rows), measure, 7, RowOwners(4, of[rows]))
        for rows in torch.arange(30).split(11)
    ]
    assert measure.values(measure.join(halves), 4)[3] == pytest.approx(values[3], rel=1e-12)
    assert all(count.sums for count in measure.counts) == ("auc" not in OWNED[loss])


def measure_rows(output: torch.Tensor, target: torch.Tensor, loss: str) -> dict[str, float]:
    return measure(output, target, loss, *OWNED[loss])


def test_a_loss_that_is_infinite_for_one_owner_spares_the_others() -> None:
    output = torch.tensor([[0.0, math.inf], [1.0, 0.0], [0.0, 2.0]]).double()
    state = Measure.of(("loss",), "cross_entropy").take(
        output, torch.tensor([0, 0, 1]), RowOwners(2, torch.tensor([1, 0, 0]))
    )
    assert torch.isfinite(state["loss"][0]).all()
    assert not torch.isfinite(state["loss"][1]).all()


def test_degenerate_predictions_have_a_value_and_no_warning() -> None:
    logits = torch.zeros(4, 2)
    logits[:, 1] = 1.0
    ones = torch.ones(4, dtype=torch.int64)
    got = measure(logits, ones, "cross_entropy", "matthews", "f1", "accuracy")
    assert got == {"matthews": 0.0, "f1": 1.0, "accuracy": 1.0}
    assert measure(logits, 1 - ones, "cross_entropy", "f1", "matthews") == {
        "f1": 0.0,
        "matthews": 0.0,
    }
    flat = measure(torch.ones(4), torch.arange(4.0), "squared_error", "pearson", "spearman")
    assert all(math.isnan(value) for value in flat.values())
    huge = measure(torch.tensor([[1e4, 0.0]]), torch.tensor([1]), "cross_entropy", "perplexity")
    assert huge["perplexity"] == math.inf


def test_a_diverged_model_is_measured_and_not_hidden() -> None:
    logits = torch.full((4, 3), math.nan)
    got = measure(logits, torch.zeros(4, dtype=torch.int64), "cross_entropy", "loss", "accuracy")
    assert math.isnan(got["loss"])
    scores = torch.tensor([1.0, math.inf, 2.0])
    assert math.isnan(measure(scores, torch.arange(3.0), "squared_error", "pearson")["pearson"])


class Mixed(nn.Module):
    """BatchNorm with a frozen part: two kinds of training flags, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.norm.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.drop(self.norm(self.layer(x)))
        return out


def test_the_model_is_left_as_it_was() -> None:
    model = Mixed().double()
    assert model.norm.running_mean is not None
    model.norm.running_mean += 0.25
    flags = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = {k: torch.full_like(v, 0.5) for k, v in model.named_parameters()}
    samples = Samples({"x": torch_normal(generator(4, "test"), 6, 3)}, torch.arange(6) % 5)
    got = evaluate(model, weights, samples, "cross_entropy", ("loss",), 4)
    assert flags == [m.training for m in model.modules()]
    assert True in flags
    assert False in flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    # In evaluation mode, at the given parameters, with the model's own buffers.
    twin = Mixed().double()
    twin.load_state_dict({**before, **weights})
    loss = F.cross_entropy(twin.eval()(samples.inputs["x"]), samples.target)
    assert got["loss"] == pytest.approx(loss.item(), rel=1e-12)


def test_flags_come_back_after_an_error() -> None:
    model = Mixed().double()
    samples = Samples({"x": torch.ones(2, 4, dtype=torch.float64)}, torch.tensor([0, 1]))
    with pytest.raises(RuntimeError):
        evaluate(model, {}, samples, "cross_entropy", ("loss",))
    assert model.training
    assert not model.norm.training


def test_models_with_named_inputs_and_logits_work() -> None:
    class Output:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 3)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Output:
            return Output((self.table(input_ids) * attention_mask[..., None]).sum(dim=1))

    model = Named()
    inputs = {"input_ids": torch.tensor([[1, 1], [3, 0]]), "attention_mask": torch.ones(2, 2)}
    samples = Samples(inputs, torch.tensor([1, 2]))
    weights = {"table.weight": torch.eye(6)[:, :3].clone()}
    assert evaluate(model, weights, samples, "cross_entropy", ("accuracy",)) == {"accuracy": 0.5}


def test_metrics_come_in_the_order_that_was_asked_for() -> None:
    logits, target = classes(5, 8, 3)
    assert list(measure(logits, target, "cross_entropy", "loss", "f1", "accuracy")) == [
        "loss",
        "f1",
        "accuracy",
    ]


def test_directions() -> None:
    lower = {name for name in METRICS if not higher_is_better(name)}
    assert lower == {"loss", "perplexity"}
    assert higher_is_better("a metric of somebody else")


def test_every_loss_has_a_metric_beside_the_loss() -> None:
    for loss in LOSSES:
        assert {n for n, m in METRICS.items() if loss in m.losses} > {"loss"}


@pytest.mark.parametrize(
    ("loss", "names", "error", "words"),
    [
        ("cross_entropy", ("acuracy",), ConfigError, "did you mean 'accuracy'"),
        ("cross_entropi", ("accuracy",), ConfigError, "unknown loss"),
        ("squared_error", ("accuracy",), ConfigError, "loss, pearson, spearman"),
        ("cross_entropy", ("pearson",), ConfigError, "computed from the outputs"),
    ],
)
def test_names_that_do_not_fit_are_refused(
    loss: str, names: tuple[str, ...], error: type[Exception], words: str
) -> None:
    logits, target = classes(6, 4, 3)
    with pytest.raises(error, match=words):
        measure(logits, target, loss, *names)


def test_bad_samples_and_weights_are_refused() -> None:
    logits, target = classes(7, 4, 3)
    with pytest.raises(DataError, match="no samples"):
        measure(logits[:0], target[:0], "cross_entropy", "loss")
    with pytest.raises(ConfigError, match="batch_size"):
        measure(logits, target, "cross_entropy", "loss", batch_size=0)
    with pytest.raises(ConfigError, match="one number per sample"):
        measure(logits, logits, "squared_error", "pearson")
    samples = Samples({"x": torch.arange(4)}, target)
    with pytest.raises(ShapeError, match="tabel"):
        evaluate(Table(logits), {"tabel": logits}, samples, "cross_entropy", ("loss",))
    with pytest.raises(ShapeError, match=r"\(3, 4\).*\(4, 3\)"):
        evaluate(Table(logits), {"table": logits.T}, samples, "cross_entropy", ("loss",))


class Words(nn.Module):
    """Attends to words that are no padding; remembers the shape of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch_normal(generator(0, "words"), 9, 3))
        self.seen: list[tuple[int, int]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        rows, length = input_ids.shape
        self.seen.append((rows, length))
        return (self.table[input_ids] * attention_mask[..., None]).sum(dim=1)


def test_padded_samples_are_measured_shortest_first_and_trimmed() -> None:
    lengths = torch.tensor([4, 2, 5, 2, 3])
    ids = torch.from_numpy(generator(1, "ids").integers(1, 9, (5, 7)))
    mask = (torch.arange(7) < lengths[:, None]).long()
    target = torch.tensor([0, 1, 2, 1, 0])
    model = Words()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    samples = Samples({"input_ids": ids, "attention_mask": mask}, target)
    got = evaluate(model, weights, samples, "cross_entropy", ("accuracy", "loss"), batch_size=2)
    assert model.seen == [(2, 2), (2, 4), (1, 5)]
    logits = model(**samples.inputs)
    assert got["loss"] == pytest.approx(F.cross_entropy(logits, target).item())
    assert got["accuracy"] == (logits.argmax(dim=1) == target).double().mean().item()
