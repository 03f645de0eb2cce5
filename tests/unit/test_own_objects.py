"""Objects of the user's: whose code raised, what may not change, where clients may not meet."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torchmetrics
import yaml
from torch import nn
from typing_extensions import override

import fedraclora
from fedraclora.client import Round, Trained
from fedraclora.commands.report.page import read_shown
from fedraclora.commands.run_files import read_files
from fedraclora.errors import ClientError, ConfigError
from fedraclora.protocol.method import Traits
from fedraclora.protocol.program import ClientProgram, GradientStage
from fedraclora.strategies.shared.layerwise import LayerMethod, LayerUpdate
from tests.common import FIXED, normal

SIZES, HERE = (5, 9, 7), __name__
cross_entropy = nn.functional.cross_entropy


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def samples(count: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = normal(count, 6, key=key).float()
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()


CLIENTS = [samples(size, key) for key, size in enumerate(SIZES)]
TABLE = tuple(map(torch.cat, zip(*CLIENTS, strict=True)))


def run(**keys: Any) -> fedraclora.RunResult:
    given = {
        "model": net(),
        "data": CLIENTS,
        "test": samples(20, 9),
        "rounds": 2,
        "clients_per_round": 3,
    }
    fixed = () if {"train", "local"} & {*keys} else FIXED
    return fedraclora.simulate(*fixed, **(given | {"method": {"rank": 2}} | keys))


@dataclass(frozen=True)
class Raises(ClientProgram):
    """Raises in one of its parts."""

    part: str = ""
    forms_gradients: ClassVar[bool] = False

    def _maybe(self, part: str) -> None:
        if part == self.part:
            raise ValueError("mine")

    def hooks(self, chunk: Any) -> Any:
        def hook(gradients: Any, values: Any) -> Any:
            self._maybe("hook")
            return gradients

        return {GradientStage.LOSS: hook}

    def optimizer(self, chunk: Any, rates: Any) -> Any:
        self._maybe("optimizer")

    def sent(self, result: Any) -> Any:
        self._maybe("sent")
        return result

    def columns(self, sent: Any, uplinks: Any) -> Any:
        self._maybe("columns")
        return {"train_loss": 1.0} if self.part == "taken" else {}


@pytest.mark.parametrize("part", ["hook", "optimizer", "sent", "columns", "taken"])
def test_what_a_part_of_a_local_step_raises_is_told_by_its_key_and_name(part: str) -> None:
    """It was the model's or the data's fault, or nobody's."""
    words = "train_loss" if part == "taken" else rf"ValueError: mine \({HERE[11:]}.py"
    with pytest.raises((ConfigError, ClientError), match=rf"extras\[1\]={HERE}:Raises.*{words}"):
        run(local={"extras": [Row(), Raises(part)]})


def late(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if len(output) > 4:  # not where it is tried
        raise ValueError("mine")
    return cross_entropy(output, target, reduction="none")


def test_what_a_loss_raises_in_the_first_step_is_told_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"data\.loss=late.*ValueError: mine"):
        run(loss=late)


class Row(ClientProgram):
    """Treats each client by itself, and draws by the seed of its chunk."""

    def hooks(self, chunk: Any) -> Any:
        drawn = torch.Generator().manual_seed(chunk.seed)
        noise = torch.rand((), generator=drawn)

        def hook(gradients: Any, values: Any) -> Any:
            long = {n: g.flatten(1).norm(dim=1).clamp(min=1.0) for n, g in gradients.items()}
            return {
                n: (g.mT / long[n]).mT * noise for n, g in gradients.items() if g.dim() == 2
            } | {n: g / long[n][:, None, None] for n, g in gradients.items() if g.dim() == 3}

        return {GradientStage.CLIP: hook}


class Means(ClientProgram):
    """Takes the mean over clients out of gradients."""

    def hooks(self, chunk: Any) -> Any:
        return {
            GradientStage.LOSS: lambda gradients, _: {
                n: g - g.mean(0) for n, g in gradients.items()
            }
        }


class Steps(ClientProgram):
    """Has all clients take the same step."""

    def optimizer(self, chunk: Any, rates: Any) -> Any:
        class Mean:
            def step(self, gradients: Any) -> None:
                for name, gradient in gradients.items():
                    chunk.values[name][: len(gradient)] -= 0.1 * gradient.mean(0)

            def moments(self, steps: torch.Tensor) -> Any:
                return {}

        return Mean()


class Forms(ClientProgram):
    """Forms the gradients of a loss in which clients meet."""

    forms_gradients = True

    def gradients(self, chunk: Any, forward: Any, active: int, width: int, step: int) -> Any:
        leaves = {n: v[:active].clone().requires_grad_() for n, v in chunk.values.items()}
        losses, counts, valid = forward(leaves, chunk.frozen)
        loss = (losses * valid).sum(1) / (counts * valid).sum(1)
        found = torch.autograd.grad(loss.sum() ** 2, [*leaves.values()])
        return loss.detach(), dict(zip(leaves, found, strict=True))


class Draws(ClientProgram):
    """Draws from the generator of the process."""

    def hooks(self, chunk: Any) -> Any:
        return {
            GradientStage.LOSS: lambda gradients, _: {
                n: g * torch.rand(()) for n, g in gradients.items()
            }
        }


class Counts(ClientProgram):
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def hooks(self, chunk: Any) -> Any:
        self.calls += 1
        return {}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (Means, "clients of its batch"),
        (Steps, "clients of its batch"),
        (Forms, "clients of its batch"),
        (Draws, "second time"),
        (Counts, "'calls'"),
    ],
)
def test_clients_may_not_meet_in_a_local_step_and_it_keeps_nothing(extra: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"local\.extras\[0\]={HERE}:{extra.__name__}.*{words}"):
        run(local={"extras": [extra()]}, engine={"chunk": 2 if extra is Means else "auto"})


def test_a_local_step_of_single_clients_is_taken_and_its_trial_leaves_no_trace() -> None:
    found, again = (run(local={"extras": [Row()]}, engine={"chunk": k}) for k in (3, 1))
    for name, value in found.weights().items():
        torch.testing.assert_close(value, again.weights()[name])


@dataclass(frozen=True)
class Keeps(LayerMethod):
    """B trains under one A; the object remembers what it has seen."""

    where: str = "nowhere"
    seen: list[int] = field(default_factory=list)
    traits = Traits(exact=True, linear=True, merges=False)
    link_rounds = None

    @override
    def factors(self, layer: Any, now: Any) -> Any:
        frozen = now.sketch(layer, "A", "gaussian", index=0, normalize="rows")
        return {"B": layer.trained("B"), "A": frozen}

    @override
    def update(self, layer: Any, replies: Any) -> LayerUpdate:
        if self.where == "list":
            self.seen.append(1)
        if self.where == "hidden":
            object.__setattr__(self, "_calls", getattr(self, "_calls", 0) + 1)
        if self.where == "cache":
            object.__setattr__(self, "_cache", {"of": len(self.__dict__)})
        return LayerUpdate(carried={"B": replies.mean("B")})


@pytest.mark.parametrize(("where", "name"), [("list", "seen"), ("hidden", "_calls")])
def test_a_method_that_changes_itself_is_refused_by_the_attribute(where: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"method: Keeps .*'{name}'.*a run that goes on"):
        run(method=Keeps(rank=2, where=where))


def test_a_method_may_cache_and_one_by_name_is_held_to_the_same() -> None:
    run(method=Keeps(rank=2, where="cache"))
    with pytest.raises(ConfigError, match=r"method: Keeps .*'seen'"):
        run(method={"name": f"{HERE}:Keeps", "rank": 2, "where": "list"})


@dataclass(frozen=True)
class Says(LayerMethod):
    """Says one thing of what it merges, and may do another; its factors are of some type."""

    merges: bool = True
    kind: str = "float64"
    what: str = "merged"

    @property
    @override
    def traits(self) -> Traits:  # type: ignore[override]
        return Traits(exact=self.what != "aggregate", linear=True, merges=self.merges)

    @override
    def factors(self, layer: Any, now: Any) -> Any:
        return {"B": layer.trained("B"), "A": now.sketch(layer, "A", "gaussian", index=layer.link)}

    @override
    def update(self, layer: Any, replies: Any) -> LayerUpdate:
        pair = replies.mean("B").to(getattr(torch, self.kind)), replies["A"].draw()
        if self.what == "carried":
            return LayerUpdate(carried={"B": pair[0]})
        return LayerUpdate(**{"merged": (replies.mean("B"), pair[1]), self.what: pair})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "system", [{}, {"buffer": 3, "speed": {"name": "constant", "value": 10.0}}]
)
def test_a_method_that_merges_and_says_that_it_does_not_is_refused(system: Any) -> None:
    with pytest.raises(ConfigError, match=r"Says .*merges=False.*\d\.weight.*merges=True"):
        run(method=Says(rank=2, merges=False), system=system)
    run(method=Says(rank=2), system=system)


@pytest.mark.parametrize("kind", ["int64", "bool", "complex64"])
@pytest.mark.parametrize(("what", "label"), [("merged", "0"), ("aggregate", "0"), ("carried", "B")])
def test_a_factor_that_is_no_float_is_refused(what: str, label: str, kind: str) -> None:
    """It was cut to whole numbers, so that the run trained nothing."""
    with pytest.raises(ConfigError, match=rf"Says returns for .* {label} as torch\.{kind}.*mean"):
        run(method=Says(rank=2, merges=what != "carried", kind=kind, what=what))


class Scaled:
    """A loss with a parameter."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.by * cross_entropy(output, target, reduction="none")


def split(data: Any, *, clients: int, seed: int, depth: int) -> Any:
    return torch.tensor_split(torch.arange(len(data.train)), clients)


def scored(output: torch.Tensor, target: torch.Tensor, task: str) -> float:
    return 1.0


scored.higher_is_better = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"local": {"extras": [Row]}}, r"local\.extras\[0\].* class Row.*give an instance"),
        ({"loss": Scaled}, r"data\.loss.* class Scaled.*give an instance"),
        ({"metrics": [torchmetrics.AUROC]}, r"data\.metrics.* class AUROC.*give an instance"),
        ({"metrics": ["torchmetrics:AUROC"]}, "AUROC.* its parameter task"),
        ({"metrics": [scored]}, r"data\.metrics: scored.*'task'"),
        ({"loss": f"{HERE}:Scaled"}, rf"{HERE}\.Scaled.* its parameter by"),
        ({"data": TABLE, "clients": 3, "partition": split}, r"split\) has no .* parameter depth"),
        ({"train": scored}, r"local\.train=scored.*'target'"),
    ],
)
def test_what_lacks_a_value_or_is_a_class_is_told_by_object_and_parameter(
    keys: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(**keys)


def learnt(round_: Round, samples: int | None = None) -> Trained:
    model = round_.install(net())
    x, y = round_.data
    cross_entropy(model(x), y).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    return round_.read(model, samples=samples or len(y), steps=1)


def claims(count: int) -> Any:
    return lambda round_: learnt(round_, count)


def long(round_: Round) -> Trained:
    model = round_.install(net())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e25 * parameter.requires_grad)
    return round_.read(model, samples=3, steps=1)


def test_what_a_function_says_of_its_samples_is_checked_and_said(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.WARNING, "fedraclora")
    run(train=learnt, output={"verbose": True})
    assert "that your function gives" in capsys.readouterr().err
    assert not caplog.records
    run(train=claims(80))
    assert "samples=80 to round.read, and has 5" in caplog.text
    assert len(caplog.records) == 1
    with pytest.raises(ClientError, match=r"samples=80000000.*engine\.max_samples, 10000000"):
        run(train=claims(80_000_000), local={"lr": 0.1})


def test_no_advice_beside_a_training_function_is_a_key_that_nothing_reads() -> None:
    with pytest.raises(ClientError, match=r"too long.*in your training function") as caught:
        run(train=long)
    assert "local.lr" not in str(caught.value)


def test_reports_and_titles_show_no_key_that_a_training_function_does_not_read(
    tmp_path: Path,
) -> None:
    found = run(train=learnt, folder=tmp_path / "run", rounds=1)
    page, files = read_shown(tmp_path / "run"), read_files(tmp_path / "run")
    assert "local.train" in files.keys
    assert not {"local.optimizer", "engine.chunk"} & {*files.keys}
    assert "optimizer" not in yaml.safe_load(page.yaml)["local"]
    assert "lr=" not in page.title
    again = fedraclora.simulate(yaml.safe_load(page.yaml), folder=None)
    assert again.summary["weights_digest"] == found.summary["weights_digest"]


def unsure(output: torch.Tensor, target: torch.Tensor) -> float:
    return math.nan


unsure.higher_is_better = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("test", [samples(20, 9), 0])
def test_a_metric_without_a_number_is_told_once_with_what_it_got(
    test: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run(metrics=["accuracy", unsure], test=test, **{"evaluate.clients": "all"})
    [told] = [each for each in caplog.messages if "not a number" in each]
    assert "clients.unsure.mean" in told
    assert ("int64 [20] from 0 to 2" in told) == bool(test)
    assert "accuracy" not in told
