"""The pretended card refuses what CUDA refuses, and finds reads that would stall a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from pretend import CARD, PretendCard, pretend_card
from torch import nn


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCard]:
    with pretend_card(monkeypatch) as pretended:
        yield pretended


def here() -> torch.Tensor:
    return torch.ones(3, 2)


def there() -> torch.Tensor:
    return torch.ones(3, 2, device="cuda")


REFUSED: dict[str, Callable[[], object]] = {
    "add": lambda: here() + there(),
    "in place": lambda: there().add_(here()),
    "cat": lambda: torch.cat([there(), here()]),
    "layer": lambda: nn.Linear(2, 2)(there()),
    "numpy": lambda: there().numpy(),
    "index": lambda: here()[torch.zeros(1, dtype=torch.int64, device="cuda")],
    "gather": lambda: there().gather(0, torch.zeros(3, 2, dtype=torch.int64)),
    "function": lambda: nn.functional.cross_entropy(there(), torch.zeros(3, dtype=torch.int64)),
    "gradient": lambda: torch.autograd.grad((there().requires_grad_() * 2).sum(), here()),
    "compare": lambda: torch.equal(here(), there()),
    "number of the card": lambda: here() * there().sum(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_two_devices_do_not_go_together(what: str, card: PretendCard) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"device|numpy|indices on cuda"):
        REFUSED[what]()


ALLOWED: dict[str, Callable[[], torch.Tensor]] = {
    "factory": there,
    "like": lambda: torch.zeros_like(there()),
    "view": lambda: there()[1:].T.detach().reshape(-1),
    "number of the host": lambda: there() * torch.tensor(2.0),
    "indices of the host": lambda: there()[torch.tensor([0])],
    "move": lambda: here().to("cuda"),
    "move to another": lambda: here().to(there()),
    "round trip": lambda: there().cpu().double().cuda(),
    "copy": lambda: there().copy_(here()),
    "parameter": lambda: nn.Parameter(there()),
    "gradient": lambda: torch.autograd.grad(sum_of(leaf := there().requires_grad_()), leaf)[0],
    "module": lambda: next(copy.deepcopy(nn.Linear(2, 2)).to("cuda").parameters()),
    "layer": lambda: nn.Linear(2, 2).to(torch.device("cuda"))(there()),
}


def sum_of(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor * tensor).sum()


@pytest.mark.parametrize("what", ALLOWED)
def test_results_lie_where_they_were_made(what: str, card: PretendCard) -> None:
    assert ALLOWED[what]().device == CARD
    assert here().device.type == there().cpu().device.type == "cpu"


def test_reads_of_the_card_are_counted(card: PretendCard) -> None:
    for tensor in (here(), there()):
        first = tensor[0, 0]
        int(first), float(first), bool(first), first.item(), tensor.tolist(), tensor.cpu()
        tensor[tensor > 0].sum()
        torch.equal(tensor, tensor)
        (tensor + tensor).sum().sqrt()
    wanted = ["__bool__", "__float__", "__getitem__", "__int__", "equal", "item", "to the host"]
    assert card.reads == dict.fromkeys([*wanted, "tolist"], 1)


def test_nothing_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.cuda.is_available()
    with monkeypatch.context() as patches, pretend_card(patches):
        kept = there()
        assert torch.cuda.is_available()
    assert torch.cuda.is_available() == before
    assert (kept + here()).device.type == "cpu"
