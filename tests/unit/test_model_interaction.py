"""Models and losses of one's own: what a batch or a mode would change is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedraclora.config.build import fix_bits
from fedraclora.data.dataset import DataSet
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError, ModelError
from fedraclora.models.built import take_module
from fedraclora.models.outputs import probe, refuse_ways

X = torch.arange(20.0).reshape(4, 5).sin()


class Centred(nn.Module):
    """A layer whose outputs are centred over an axis."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = nn.Linear(5, 3), axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.layer(x)
        return hidden - hidden.mean(dim=self.axis, keepdim=True)


def test_statistics_of_a_batch_are_refused() -> None:
    x = X
    with pytest.raises(ModelError, match="samples of its batch"):
        refuse_ways(Centred(0), {"x": x})
    refuse_ways(Centred(1), {"x": x})
    refuse_ways(Centred(0), {"x": x[:1]})  # with one sample nothing is seen
    refuse_ways(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).train(), {"x": x})


def test_what_a_layer_of_zeros_hides_is_seen() -> None:
    """A head of zeros gives the same for every batch, until it is trained."""
    head = nn.Linear(3, 2)
    nn.init.zeros_(head.weight)
    with pytest.raises(ModelError, match="the other samples"):
        refuse_ways(nn.Sequential(Centred(0), head), {"x": X})


class Moded(nn.Module):
    """A layer that differs in training mode, draws numbers, or writes into its input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(5, 3), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        if self.kind == "writes":
            x.mul_(2)
        if self.kind == "noise":
            return out + torch.randn_like(out)
        if not self.training or self.kind == "nothing":
            return out
        if self.kind == "doubled":
            return 2 * out
        if self.kind == "rarely":
            return out * 0 if torch.rand(()) < 0.3 else out
        if self.kind == "numpy":
            return out + float(np.random.rand())  # noqa: NPY002
        return out.detach()  # the same numbers, and no gradient


MODES = {
    "doubled": "than in evaluation mode",
    "rarely": "than in evaluation mode",
    "numpy": "than in evaluation mode",
    "no gradient": "gradient of layer.0.weight",
}


@pytest.mark.parametrize("kind", MODES)
def test_a_branch_on_training_that_would_never_run_is_refused(kind: str) -> None:
    model = nn.Sequential()
    model.layer = nn.Sequential(nn.Linear(5, 5), Moded(kind))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    with pytest.raises(ModelError, match=MODES[kind]):
        refuse_ways(model.train(), {"x": X})
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002


def probed(model: nn.Module, samples: Samples, loss: str) -> None:
    """Probe a model that is to tell three classes."""
    data = DataSet(samples, samples, 3, loss, ("loss",), {}, ())
    probe(model, samples, data, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "said"), [("noise", "something else each time"), ("writes", "into its input x")]
)
def test_a_model_that_draws_numbers_or_changes_its_samples_is_refused(kind: str, said: str) -> None:
    samples, x = Samples({"x": X.clone()}, torch.tensor([0, 1, 2, 0])), X.clone()
    with pytest.raises(ModelError, match=said):
        probed(Moded(kind).train(), samples, "cross_entropy")
    assert torch.equal(samples.inputs["x"], x)


def test_dropout_of_torch_and_frozen_statistics_are_alike_in_both_modes() -> None:
    norm = nn.BatchNorm1d(4)
    block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
    layers = (nn.Linear(5, 4), norm.eval(), nn.Dropout(0.5), Shaped(block), nn.Linear(4, 2))
    model = nn.Sequential(*layers).train()
    norm.eval()
    refuse_ways(model, {"x": X})
    refuse_ways(Moded("nothing").train(), {"x": X})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_torch_has_compiled_with_weights_in_it_is_refused_by_name() -> None:
    first, *rest = nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)
    take_module(nn.Sequential(first, torch.jit.script(rest[0]), rest[1]), "f")
    part = nn.Sequential(first, torch.jit.script(nn.Sequential(*rest)))
    whole = torch.jit.script(nn.Sequential(first, *rest))
    for model, said in ((part, "layer '1'"), (whole, "the model")):
        with pytest.raises(ModelError, match=f"f: {said} was compiled by torch.jit"):
            take_module(model, "f")


def test_a_model_that_draws_nothing_is_passed_once_in_training_mode() -> None:
    calls: list[bool] = []
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).train()
    model.register_forward_hook(lambda module, *_: calls.append(module.training))
    refuse_ways(model, {"x": X})
    assert calls == [False, False, False, True]


class Shaped(nn.Module):
    """Hands vectors to a block of sequences."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block(x[:, None])
        return out[:, 0]


def balanced(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights by how often a class occurs in the batch."""
    losses, ones = alone(output, target)
    return losses / (target == target[:, None]).sum(dim=1), ones


def centred(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    losses, ones = alone(output, target)
    return losses - losses.mean(), ones


def alone(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.cross_entropy(output, target, reduction="none"), torch.ones_like(target)


@pytest.mark.parametrize("name", ["balanced", "centred"])
def test_a_loss_whose_samples_interact_is_refused_as_a_model_is(name: str) -> None:
    samples = Samples({"x": X}, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ConfigError, match=rf"{name}\b.*(depends on the other|no gradient)"):
        probed(nn.Linear(5, 3), samples, f"{__name__}:{name}")
    probed(nn.Linear(5, 3), samples, f"{__name__}:alone")
    probed(nn.Linear(5, 3), samples, "cross_entropy")


def test_what_a_model_raises_is_told_with_the_shapes_of_its_inputs() -> None:
    samples = Samples({"x": X}, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ModelError, match=r"'x': \(1, 5\).* raises RuntimeError"):
        probed(nn.Linear(4, 3), samples, "cross_entropy")


def test_a_transformer_block_of_torch_has_derivatives_in_evaluation_mode() -> None:
    """Local training runs models in evaluation mode, where torch takes a path that has none."""
    fix_bits(1, torch.device("cpu"))
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).eval()
    weights = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, weights, (torch.ones(1, 3, 6),)).square().sum()

    gradients = torch.func.grad(loss)(weights)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
