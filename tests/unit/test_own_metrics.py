from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torchmetrics.classification import BinaryAveragePrecision, MultilabelAUROC

from fedraclora.errors import ConfigError
from fedraclora.evaluation.metrics import Measure, RowOwners, higher_is_better
from fedraclora.evaluation.own_metrics import Metric
from fedraclora.object_registry import register_object
from fedraclora.rng import generator, torch_normal

torch.set_num_threads(1)
Tensor = torch.Tensor
OWNERS = torch.from_numpy(generator(5, "own metrics").integers(0, 3, 40))


def case(loss: str) -> tuple[Tensor, Tensor]:
    rng = generator(6, "own metrics", loss)
    shapes = {"logistic": (40, 1), "squared_error": (40, 2), "pixel_classes": (40, 3, 2, 2)}
    output = torch_normal(rng, *shapes.get(loss, (40, 3)))
    if loss == "squared_error":
        return output, output + torch_normal(rng, 40, 2)
    if loss == "multi_label":
        return output, torch.from_numpy(rng.integers(0, 2, (40, 3))).double()
    target = torch.from_numpy(
        rng.integers(0, 2 if loss == "logistic" else 3, (40, 2, 2) if "pixel" in loss else 40)
    )
    return output, target


# Of a metric: the loss, whether it is of sums, and its value by torchmetrics alone.
KINDS: dict[str, tuple[str, bool, Any, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]] = {
    "area": (
        "cross_entropy",
        False,
        torchmetrics.AUROC(task="multiclass", num_classes=3),
        lambda o, t: (o.softmax(1), t),
    ),
    "area of scores": (
        "logistic",
        False,
        torchmetrics.AUROC(task="binary"),
        lambda o, t: (o.sigmoid()[:, 0], t),
    ),
    "area by thresholds": (
        "logistic",
        True,
        torchmetrics.AUROC(task="binary", thresholds=9),
        lambda o, t: (o.sigmoid()[:, 0], t),
    ),
    "precision": (
        "logistic",
        False,
        BinaryAveragePrecision(),
        lambda o, t: (o.sigmoid()[:, 0], t),
    ),
    "labels": (
        "multi_label",
        False,
        MultilabelAUROC(num_labels=3),
        lambda o, t: (o.sigmoid(), t.long()),
    ),
    "calibration": (
        "cross_entropy",
        False,
        torchmetrics.CalibrationError(task="multiclass", num_classes=3),
        lambda o, t: (o.softmax(1), t),
    ),
    "root of squares": (
        "squared_error",
        True,
        torchmetrics.MeanSquaredError(squared=False),
        lambda o, t: (o, t),
    ),
    "R2": ("squared_error", True, torchmetrics.R2Score(), lambda o, t: (o, t)),
    "pixels": (
        "pixel_classes",
        True,
        torchmetrics.Accuracy(task="multiclass", num_classes=3, average="micro"),
        lambda o, t: (o.movedim(1, -1).reshape(-1, 3), t.flatten()),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_torchmetrics_add_up_over_batches_and_owners(kind: str) -> None:
    loss, sums, metric, plain = KINDS[kind]
    output, target = case(loss)
    name = register_object(metric, f"mine@{0:016x}")
    measure = Measure.of((name,), loss)
    assert all(count.sums for count in measure.counts) is sums
    batches = [
        measure.take(output[rows], target[rows], RowOwners(3, OWNERS[rows]))
        for rows in torch.arange(40).split(9)
    ]
    state = measure.join(batches)

    def alone(rows: Tensor) -> float:
        metric.reset()
        metric.set_dtype(torch.float64)
        metric.update(*plain(output[rows], target[rows]))
        return float(metric.compute())

    each = [values["mine"] for values in measure.values(state, 3)]
    wanted = [alone(owner == OWNERS) for owner in range(3)]
    assert each == pytest.approx(wanted, rel=1e-6 if "area" in kind or kind == "labels" else 1e-12)
    pooled = measure.values(measure.pooled(state))[0]["mine"]
    assert pooled == pytest.approx(alone(torch.arange(40)), rel=1e-6)
    assert higher_is_better("mine", measure.lower) is bool(metric.higher_is_better)


def test_an_area_of_one_class_is_no_number() -> None:
    measure = Measure.of(
        (register_object(torchmetrics.AUROC(task="binary"), f"mine@{1:016x}"),), "logistic"
    )
    state = measure.take(torch.randn(5, 1), torch.ones(5, dtype=torch.int64))
    assert math.isnan(measure.values(state)[0]["mine"])


def spread(output: Tensor, target: Tensor) -> float:
    return float((output - target).abs().amax())


def off(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean(dim=1)


def test_functions_see_all_outputs_or_give_a_number_for_each_row() -> None:
    output, target = case("squared_error")
    whole, each = Metric(spread, higher_is_better=False), Metric(off, False, each=True)
    names = [register_object(whole, f"spread@{2:016x}"), register_object(each, f"off@{2:016x}")]
    measure = Measure.of(names, "squared_error")
    batches = [
        measure.take(output[rows], target[rows], RowOwners(3, OWNERS[rows]))
        for rows in torch.arange(40).split(9)
    ]
    state = measure.join(batches)
    assert measure.lower == ["spread", "off"]
    assert [n for n, m in measure.metrics.items() if m.count.sums] == ["off"]
    for owner, found in enumerate(measure.values(state, 3)):
        rows = owner == OWNERS
        assert found["spread"] == spread(output[rows], target[rows])
        assert found["off"] == pytest.approx(
            float(off(output[rows], target[rows]).mean()), rel=1e-12
        )


def vague(output: Tensor, target: Tensor) -> float:
    return 1.0


BAD: dict[str, tuple[Any, str]] = {
    "no direction": (vague, "whether more of it is better"),
    "a vector": (Metric(lambda o, t: o.sum(dim=0), True), r"shape \(3,\).*one number"),
    "a word": (Metric(lambda o, t: "good", True), "gives str"),
    "nothing": (Metric(lambda o, t: None, True), "gives NoneType"),
    "an error": (Metric(lambda o, t: o @ o, True), "raises RuntimeError"),
    "too few rows": (Metric(lambda o, t: o[1:, 0], True, each=True), r"shape \(39,\) for 40"),
    "no tensor": (Metric(lambda o, t: 1.0, True, each=True), "float for 40"),
    "each class": (
        torchmetrics.AUROC(task="multiclass", num_classes=3, average=None),
        "average='macro'",
    ),
    "a wrong task": (torchmetrics.AUROC(task="binary"), "computing it raises"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_metric_is_refused_by_name(name: str) -> None:
    metric, words = BAD[name]
    own, batch = register_object(metric, f"mine@{3:016x}"), case("cross_entropy")

    def measured() -> object:
        measure = Measure.of((own,), "cross_entropy")
        return measure.values(measure.take(*batch))

    with pytest.raises(ConfigError, match=f"mine.*{words}"):
        measured()


def test_names_of_metrics_are_unique() -> None:
    for other in ("accuracy", "mine"):
        names = [register_object(Metric(spread, True), f"{n}@{4:016x}") for n in ("mine", other)]
        with pytest.raises(ConfigError, match=f"{other} .*name of another"):
            Measure.of(names, "cross_entropy")


def test_perfect_probabilities_are_not_read_as_scores() -> None:
    """Torchmetrics takes what lies in [0, 1] for probabilities; ours are made of the logits."""
    output = torch.tensor([[0.4], [0.3], [0.2]])  # logits, all of which say yes
    measure = Measure.of(
        (register_object(torchmetrics.Accuracy(task="binary"), f"mine@{5:016x}"),), "logistic"
    )
    assert measure.values(measure.take(output, torch.tensor([1, 1, 1])))[0]["mine"] == 1.0
    assert bool((F.logsigmoid(output).exp() > 0.5).all())


@pytest.mark.slow
def test_nothing_imports_torchmetrics_before_a_metric_of_it_is_used() -> None:
    code = "import sys, fedraclora.evaluation.evaluate; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
