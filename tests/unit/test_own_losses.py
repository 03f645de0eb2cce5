from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import AUROC, MeanSquaredError

import fedraclora
from fedraclora.commands.compare import table as comparing
from fedraclora.commands.report.page import ReportedRun, results
from fedraclora.commands.run_files import read_files
from fedraclora.commands.study.file import refuse_lower
from fedraclora.data.own_loss import OwnLoss, check_loss
from fedraclora.errors import ConfigError, FedRacLoraError
from fedraclora.rng import generator, torch_normal
from fedraclora.terminal.opening import introduction
from tests.common import FIXED

torch.set_num_threads(1)
QUIET = ("output.progress=false",)
Tensor = torch.Tensor


def focal(output: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Down-weights what is right already (Lin et al., 2017, arXiv 1708.02002, eq. 4)."""
    log = output.log_softmax(dim=1).gather(1, target[:, None])[:, 0]
    return -((1 - log.exp()) ** gamma) * log


def counts() -> Callable[[Tensor, Tensor], Tensor]:
    seen: list[int] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(1)
        return focal(output, target) * len(seen)

    return loss


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heat = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return focal(output / self.heat, target)


def writing(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.mul_(2.0), target, reduction="none")


def of_batch(output: Tensor, target: Tensor) -> Tensor:
    losses = focal(output, target)
    return losses / losses.detach().mean()


def hard(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(dim=1) != target).float()


def rounded(output: Tensor, target: Tensor) -> Tensor:
    return focal(output.round(), target)


def rooted(output: Tensor, target: Tensor) -> Tensor:
    return (output - output.detach()).square().sum(dim=1).sqrt()


def broken(output: Tensor, target: Tensor) -> Tensor:
    raise ArithmeticError("no loss")


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "a scalar": (F.cross_entropy, r"a scalar.*reduction='none'"),
    "a module with a mean": (nn.CrossEntropyLoss(), r"a scalar.*reduction='none'"),
    "no tensor": (lambda output, target: 3.0, "no tensor for 4"),
    "nothing": (lambda output, target: None, "no tensor for 4"),
    "numpy": (lambda output, target: focal(output, target).detach().numpy(), "no tensor"),
    "one loss too few": (lambda output, target: focal(output, target)[1:], r"\(3,\) for 4"),
    "a loss for each class": (lambda o, t: o.log_softmax(dim=1), r"\(4, 3\) for 4"),
    "spread out": (lambda o, t: (o[:, :1] - t) ** 2, r"\(4, 4\).*spread out"),
    "three tensors": (lambda o, t: (focal(o, t),) * 3, r"\(4,\), \(4,\), \(4,\)"),
    "negative parts": (lambda o, t: (focal(o, t), -torch.ones(4)), "numbers of parts"),
    "samples that interact": (of_batch, "depends on the other samples"),
    "an infinity": (lambda o, t: focal(o, t) / 0.0, "losses must be finite"),
    "a choice": (hard, "no gradient"),
    "a rounded output": (rounded, "no gradient"),
    "a detached output": (lambda o, t: focal(o.detach(), t), "no gradient"),
    "a root at 0": (rooted, "a NaN or an infinity"),
    "whole numbers": (lambda o, t: hard(o, t).long(), "no gradient"),
    "another type": (F.binary_cross_entropy_with_logits, r"int64 on cpu raises ValueError"),
    "an error": (broken, "ArithmeticError: no loss"),
    "a call with one argument": (lambda output: output, "TypeError"),
    "numbers that are drawn": (lambda o, t: focal(o, t) * torch.rand(len(t)), "no random numbers"),
    "what is kept": (counts(), "keep no state"),
    "an output written into": (writing, "changes its output"),
    "weights of its own": (Learned(), "weights of its own"),
}


def few() -> tuple[Tensor, Tensor]:
    output = torch_normal(generator(0, "own losses"), 4, 3).float()
    output[3] = output[0]
    return output, torch.tensor([0, 2, 1, 0])


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_loss_is_refused_by_name(case: str) -> None:
    function, words = WRONG[case]
    with pytest.raises(ConfigError, match=rf"mine.*{words}"), torch.no_grad():
        check_loss(OwnLoss("mine", function), *few())


def test_a_loss_that_draws_or_counts_is_told_from_one_whose_samples_interact() -> None:
    for case in ("numbers that are drawn", "what is kept"):
        with pytest.raises(ConfigError, match="called twice"):
            check_loss(OwnLoss("mine", WRONG[case][0]), *few())


def test_a_loop_of_ones_own_may_have_a_scalar_the_mean_of_its_batch() -> None:
    loss, (output, target) = OwnLoss("mine", F.cross_entropy), few()
    check_loss(loss, output, target, scalar=True)
    losses, parts = loss(output, target)
    assert float(losses.sum() / parts.sum()) == pytest.approx(
        float(F.cross_entropy(output, target))
    )
    with pytest.raises(ConfigError, match="no gradient"):
        check_loss(OwnLoss("mine", lambda o, t: hard(o, t).mean()), output, target, scalar=True)


def hinge(output: Tensor, target: Tensor) -> Tensor:
    """Flat wherever the margin is kept."""
    right = output.gather(1, target[:, None])
    others = output.scatter(1, target[:, None], -torch.inf).amax(dim=1)
    return (0.1 + others - right[:, 0]).clamp(min=0.0)


GOOD: dict[str, Callable[..., Any]] = {
    "plain": focal,
    "partial": partial(focal, gamma=0.5),
    "a module": nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1),
    "weights of classes": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), reduction="none"),
    "a column": lambda output, target: focal(output, target)[:, None],
    "parts": lambda output, target: (2 * focal(output, target), torch.full((len(target),), 2)),
    "flat here": hinge,
}


@pytest.mark.parametrize("case", GOOD)
def test_a_sound_loss_gives_losses_and_parts(case: str) -> None:
    output, target = few()
    if case == "flat here":
        output = 5.0 * F.one_hot(target, 3).float()
    loss = OwnLoss(case, GOOD[case])
    check_loss(loss, output, target)
    losses, parts = loss(output, target)
    assert losses.shape == parts.shape == (4,)
    wide, _ = loss(output.double(), target)  # weights of classes follow the outputs
    torch.testing.assert_close(wide.float(), losses)


def test_a_loss_for_each_number_of_the_target_counts_its_parts() -> None:
    output, target = torch_normal(generator(1, "own losses"), 4, 3), torch.rand(4, 3)
    losses, parts = OwnLoss("mine", nn.MSELoss(reduction="none"))(output, target)
    assert float(losses.sum() / parts.sum()) == pytest.approx(float(F.mse_loss(output, target)))
    maps, classes = (
        torch_normal(generator(2, "own losses"), 4, 3, 2, 2),
        torch.randint(3, (4, 2, 2)),
    )
    classes[1, 0] = -100
    losses, parts = OwnLoss("mine", nn.CrossEntropyLoss(reduction="none"))(maps, classes)
    assert parts.tolist() == [4, 2, 4, 4]
    wanted = F.cross_entropy(maps, classes)
    assert float(losses.sum() / parts.sum()) == pytest.approx(float(wanted))


@pytest.mark.parametrize("kind", [nn.MSELoss, nn.BCEWithLogitsLoss])
def test_a_score_beside_a_target_is_not_spread_out_by_losses_of_torch(kind: Any) -> None:
    output, target = torch_normal(generator(7, "own losses"), 4, 1), torch.tensor([0, 1, 1, 0])
    loss = OwnLoss("mine", kind(reduction="none"))
    check_loss(loss, output, target)
    losses, parts = loss(output, target)
    wanted = kind()(output[:, 0], target.double())
    assert float(losses.sum() / parts.sum()) == pytest.approx(float(wanted), rel=1e-12)


def clients(samples: int = 60) -> list[tuple[Tensor, Tensor]]:
    x = torch_normal(generator(3, "own losses"), samples, 5).float()
    y = (x[:, 0] + 0.3 * x[:, 1] > 0).long()
    return [(x[:20], y[:20]), (x[20:25], y[20:25]), (x[25:], y[25:])]


def net(outputs: int = 2) -> nn.Module:
    built = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs))
    with torch.no_grad():
        for place, parameter in enumerate(built.parameters()):
            rng = generator(4, "own losses", place)
            parameter.copy_(0.5 * torch_normal(rng, *parameter.shape))
    return built


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("mine_of_test")
    module.__dict__.update(
        focal=focal, area=AUROC(task="multiclass", num_classes=2), Area=AUROC, wrong=wrong
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def wrong(output: Tensor, target: Tensor) -> Tensor:
    """Share of wrong answers."""
    return (output.argmax(dim=1) != target).double().mean()


wrong.higher_is_better = False  # type: ignore[attr-defined]


def judged(engine: str, loss: Any, metrics: Any, **keys: Any) -> fedraclora.api.RunResult:
    words = (*QUIET, f"engine={engine}", "local.batch_size=4", "local.lr=0.3")
    return fedraclora.simulate(
        *words, model=net(), data=clients(), rounds=2, loss=loss, metrics=metrics, **keys
    )


def values(run: Any, column: str) -> list[float]:
    return [row["metrics"][column] for row in run.rows]


@pytest.mark.parametrize(
    "engine", ["inline", pytest.param("ray", marks=pytest.mark.long), "vectorized"]
)
def test_objects_and_names_of_losses_and_metrics_give_equal_bits(engine: str, mine: str) -> None:
    area = AUROC(task="multiclass", num_classes=2)
    one = judged(engine, focal, ["accuracy", area, wrong, "loss"])
    assert values(one, "loss")[-1] < values(one, "loss")[0]
    if engine == "ray":  # its processes know no module of a test
        other = judged("vectorized", focal, ["accuracy", area, wrong, "loss"])
        assert values(one, "loss") == values(other, "loss")
        assert one.summary["weights_digest"] == other.summary["weights_digest"]
        return
    named = {"name": f"{mine}:Area", "task": "multiclass", "num_classes": 2}
    metrics = ["accuracy", named, f"{mine}:wrong", "loss"]
    other = judged(engine, {"name": f"{mine}:focal", "gamma": 2.0}, metrics)
    assert one.summary["weights_digest"] == other.summary["weights_digest"]
    for column in ("accuracy", "wrong", "loss"):
        assert values(one, column) == values(other, column)
    assert values(one, "MulticlassAUROC") == values(other, "Area")
    assert values(one, "wrong")[-1] == pytest.approx(1 - values(one, "accuracy")[-1])
    assert one.summary["task"]["lower_is_better"] == ["wrong"]  # type: ignore[index]


def test_a_loss_of_ones_own_is_the_projects_where_it_is_the_same() -> None:
    def again(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none")

    one = judged("inline", "cross_entropy", ["accuracy", "loss"])
    other = judged("inline", again, None)
    assert values(one, "loss") == pytest.approx(values(other, "loss"), rel=1e-6)
    assert values(one, "accuracy") == values(other, "accuracy")
    assert one.model()(clients()[0][0]).shape == (20, 2)
    said = other.predict(clients()[0][0])  # read as for cross_entropy, which is a guess
    assert {"prediction", "probability.0"} <= {*said.columns}
    assert "read as those of cross_entropy" in introduction(other.summary["begins"])["loss"]  # type: ignore[index]


def divided(data: Any, clients: int, seed: int) -> list[Any]:
    """A partition of the user's own, by the classes that it is shown."""
    del clients, seed
    return [np.flatnonzero(data.columns["label"] == k) for k in range(2)]


@pytest.mark.parametrize("words", [("attack=label_flip",), ("data.labels=[1,0]",), ()])
@pytest.mark.parametrize("partition", ["dirichlet", "shards", divided])
def test_a_loss_that_says_nothing_hides_no_classes(words: tuple[str, ...], partition: Any) -> None:
    """Accuracy was reported, but partitions by class and attacks on them were refused."""

    def silent(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none")

    x, y = (torch.cat(each) for each in zip(*clients(), strict=True))
    given = {"model": net(), "data": (x, y), "clients": 2, "partition": partition, "rounds": 1}
    losses = silent, "cross_entropy"
    runs = [fedraclora.simulate(*QUIET, *FIXED, *words, **given, loss=loss) for loss in losses]
    one, other = (run.rows[1]["metrics"] for run in runs)
    assert one == pytest.approx(other, abs=1e-6)
    counts = [run.builder.built.label_counts(torch.arange(2)).tolist() for run in runs]
    assert counts[0] == counts[1]


def test_a_logistic_loss_has_classes_to_divide_by_and_counts_of_the_users_are_none() -> None:
    x, y = (torch.cat(each) for each in zip(*clients(), strict=True))
    given: dict[str, Any] = {"data": (x, y), "clients": 2, "partition": "dirichlet", "rounds": 0}
    yes = fedraclora.simulate(*QUIET, model=net(1), loss="logistic", **given)
    assert yes.builder.built.classes == 0
    with pytest.raises(ConfigError, match="divides by class"):
        fedraclora.simulate(*QUIET, **given | {"model": net(1), "data": (x, y + 0.5)}, loss=focal)


@pytest.mark.slow
def test_a_run_that_is_resumed_wants_the_same_loss(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"metrics": [wrong, "loss"], "folder": tmp_path / "run"}

    def stop(row: dict[str, Any]) -> None:
        if row["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged("inline", focal, callbacks=[stop], **keys)
    with pytest.raises(FedRacLoraError):
        judged("inline", partial(focal, gamma=1.0), resume=True, **keys)
    assert judged("inline", focal, resume=True, **keys).summary


def test_any_data_set_takes_a_loss_and_metrics_of_ones_own(tmp_path: Path, mine: str) -> None:
    words = (*QUIET, "clients=4", "clients_per_round=2", "rounds=0", "pretrain=none")
    found = fedraclora.simulate(
        *words, "data=digits", f"data.loss={mine}:focal", f"data.metrics=[{mine}:wrong,accuracy]"
    )
    assert [*found.rows[0]["metrics"]] == ["wrong", "accuracy"]
    with pytest.raises(ConfigError, match="squared_error, but these data"):
        fedraclora.simulate(*words, "data=digits", "data.loss=squared_error")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "rows.npz", x=rng.normal(size=(30, 4)), target=rng.normal(size=30))
    x = rng.normal(size=(30, 3))
    lines = [",".join(map(str, (*row, "a" if row[0] > 0 else "b"))) for row in x]
    (tmp_path / "rows.csv").write_text("\n".join(["p,q,r,label", *lines]))
    found = fedraclora.simulate(
        *words, data=tmp_path / "rows.csv", target="label", loss=focal, metrics=[wrong]
    )
    assert [*found.rows[0]["metrics"]] == ["wrong"]
    found = fedraclora.simulate(
        *words,
        data={"name": "arrays", "file": str(tmp_path / "rows.npz"), "task": "regression"},
        loss=nn.HuberLoss(reduction="none"),
        metrics=["pearson", MeanSquaredError(squared=False), "loss"],
    )
    assert [*found.rows[0]["metrics"]] == ["pearson", "MeanSquaredError", "loss"]


def test_a_loss_says_for_which_its_outputs_are_read() -> None:
    def yes(output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output[:, 0], target.float(), reduction="none")

    yes.like = "logistic"  # type: ignore[attr-defined]
    data = clients()
    found = fedraclora.simulate(*QUIET, model=net(1), data=data, rounds=0, loss=yes)
    wanted = fedraclora.simulate(*QUIET, model=net(1), data=data, rounds=0, loss="logistic")
    assert found.rows[0]["metrics"] == pytest.approx(wanted.rows[0]["metrics"])
    yes.like = "logistics"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="did you mean 'logistic'"):
        fedraclora.simulate(*QUIET, model=net(1), data=data, rounds=0, loss=yes)


def test_who_chooses_by_a_metric_of_ones_own_knows_its_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: str
) -> None:
    monkeypatch.setattr(comparing, "compare_figure", lambda *_, **__: None)
    words = (*QUIET, "engine=inline", "data.validation=0.2", "output.plots=false")
    keys: dict[str, Any] = {"metrics": [wrong, "loss"], "loss": focal, "rounds": 9}
    stop = {"metric": "wrong", "patience": 2}
    for name, rate in (("still", 1e-6), ("moving", 0.5)):
        run = fedraclora.simulate(
            *words,
            model=net(),
            data=clients(200),
            folder=tmp_path / name,
            local={"lr": rate},
            stop=stop,
            **keys,
        )
        best = min(run.rows, key=lambda row: row["validation"]["wrong"])
        assert run.summary["best"]["round"] == best["round"]  # type: ignore[index]
        assert run.summary["rounds"] < 9  # shares fall to an end, or do not move
    table = comparing.compare_runs([tmp_path], tmp_path / "out", "wrong", target=0.4)
    means = [record["metric_mean"] for record in table.records]
    assert means == sorted(means)
    assert means[0] < means[1]
    assert [record["rank"] for record in table.records] == [1, 2]
    shown = [ReportedRun(**vars(read_files(tmp_path / name))) for name in ("still", "moving")]
    assert [best for *_, best in results(["still", "moving"], shown)] == [False, True]
    bad, data = {"metric": "wrongs", "patience": 2}, clients()
    with pytest.raises(ConfigError, match=r"unknown stop\.metric 'wrongs'"):
        fedraclora.simulate(*words[:3], model=net(), data=data, stop=bad, **keys)
    with pytest.raises(ConfigError, match=r"wrong, .*less is better"):
        refuse_lower("the study", "wrong", read_files(tmp_path / "still").lower)


def test_half_squares_are_summed_over_a_target_and_torchs_own_loss_has_their_mean() -> None:
    rng = generator(4, "wide")
    data = [(torch_normal(rng, n, 3).float(), torch_normal(rng, n, 5).float()) for n in (9, 14)]
    given = {"model": nn.Linear(3, 5), "data": data, "test": data[0], "rounds": 0}
    given["data"] = [data[1], (data[0][0] + 1, data[0][1])]
    plain = fedraclora.simulate(*QUIET, **given, loss="squared_error")
    gap = (given["model"](data[0][0]).detach() - data[0][1]).square()
    found = plain.rows[0]["metrics"]["loss"]
    assert found == pytest.approx(float(0.5 * gap.sum(dim=1).mean()), rel=1e-5)
    assert "summed over the 5 numbers" in introduction(plain.summary["begins"])["loss"]
    mean = fedraclora.simulate(*QUIET, **given, loss=nn.MSELoss(reduction="none"))
    assert mean.rows[0]["metrics"]["loss"] == pytest.approx(float(gap.mean()), rel=1e-5)
    one = [(x, y[:, :1]) for x, y in given["data"]]
    short = fedraclora.simulate(*QUIET, model=nn.Linear(3, 1), data=one, rounds=0)
    assert "summed" not in introduction(short.summary["begins"])["loss"]
