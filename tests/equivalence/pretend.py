"""A GPU that is not there: tensors in the host's memory that behave as if they lay on a card.

PyTorch without CUDA runs everything on the CPU. Under `pretend_card` every tensor says where it
would lie, and what CUDA refuses is refused: operations on tensors of two devices, and numpy on a
tensor of the card. Numbers come from the CPU's kernels, so a run on this card must end with the
bits of a run without it. Reads of the card by the host are counted: each stalls a real GPU.

It sees calls of PyTorch's Python functions only. Kernels, streams, real memory and the speed of a
GPU are not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from fedraclora.training.memory import LiveTensors

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")
NAME, FREE = "Pretended card", 60 * 10**9
T: Any = torch.Tensor
GATHERS = {T.__getitem__, T.__setitem__, T.index_put_, T.index_put}
READS = {T.item, T.tolist, T.__bool__, T.__int__, T.__float__, T.__index__, T.nonzero, T.equal}
READS |= {torch.nonzero, torch.equal}
NUMPY = {T.numpy, T.__array__}
ANYWHERE = {T.copy_, T.data.__set__, torch._has_compatible_shallow_copy_type}


def on_card(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on the card."""
    return bool(getattr(tensor, "_on_card", False))


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Give the tensors of what goes into a function or comes out of it."""
    # Not by torch's pytrees: this runs at every call, and they took most of its time.
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def place(tensor: torch.Tensor, *, card: bool) -> torch.Tensor:
    """Note where a tensor lies."""
    tensor._on_card = card  # type: ignore[attr-defined]
    return tensor


class PretendCard(TorchFunctionMode):
    """While it is entered, ``cuda`` is a device.

    Attributes:
        reads: How often the host read tensors of the card, by function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func in {T.to, T.cpu, T.cuda}:
            return self._move(func, args, given)
        if func == T.device.__get__:
            return CARD if on_card(args[0]) else func(*args)
        if func == T.is_cuda.__get__:
            return on_card(args[0])
        tensors = [*tensors_in(args), *tensors_in(given)]
        card = where(func, tensors)
        if card and func in NUMPY:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if card and (func in READS or masked(func, args)):
            self.reads[name_of(func)] += 1
        if (wanted := given.pop("device", None)) is not None:
            card = torch.device(wanted).type == "cuda"
        out = func(*args, **given)
        if func == T.data.__set__:
            place(args[0], card=on_card(args[1]))
        for made in tensors_in(out):
            place(made, card=card)
        return out

    def _move(self, func: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        tensor, *rest = args
        wanted: torch.device | None
        if func == T.cpu:
            wanted = HOST
        elif func == T.cuda:
            wanted = CARD
        elif rest and isinstance(rest[0], torch.Tensor):
            wanted, rest[0] = (CARD if on_card(rest[0]) else HOST), rest[0].dtype
        else:
            asked = {k: v for k, v in given.items() if k != "copy"}
            wanted, dtype, *_ = torch._C._nn._parse_to(*rest, **asked)
            given = {k: v for k, v in given.items() if k not in {"device", "dtype"}}
            rest = [] if dtype is None else [dtype]
        card = on_card(tensor) if wanted is None else wanted.type == "cuda"
        moves = card != on_card(tensor)
        if moves and not card:
            self.reads["to the host"] += 1
        out = T.to(tensor, *rest, **given) if rest or given else tensor
        return place(tensor.clone() if moves and out is tensor else out, card=card)


def where(func: Callable[..., Any], tensors: list[torch.Tensor]) -> bool:
    """Whether an operation runs on the card.

    Raises:
        RuntimeError: If its tensors lie on two devices.
    """
    if not tensors:
        return False
    if func in GATHERS:  # indices may lie on the host
        inside = [on_card(t) for t in tensors]
        if any(inside) and not inside[0]:
            raise RuntimeError(f"{name_of(func)}: indices on cuda:0 for a tensor on cpu")
        return inside[0]
    # A single number of the host goes with anything; what torch.func wraps hides where it lies.
    hidden = torch._C._functorch.is_functorch_wrapped_tensor
    places = {on_card(t) for t in tensors if (t.dim() or on_card(t)) and not hidden(t)}
    if len(places) == 2 and func not in ANYWHERE:
        raise RuntimeError(f"{name_of(func)}: expected all tensors to be on the same device")
    return any(on_card(t) for t in tensors)


def masked(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether an operation must find out how many numbers a mask leaves."""
    if func not in GATHERS:
        return False
    return any(index.dtype == torch.bool for index in tensors_in(args[1]))


def name_of(func: Callable[..., Any]) -> str:
    """Name a function."""
    return str(getattr(func, "__name__", func))


@dataclass(frozen=True)
class Card:
    """A card, pretended or (None) real."""

    pretended: PretendCard | None

    def assert_near(
        self,
        found: Mapping[str, torch.Tensor],
        wanted: Mapping[str, torch.Tensor],
        tolerance: float,
    ) -> None:
        """Hold tensors of the card against the CPU's: near, and equal where it is pretended."""
        near = 0.0 if self.pretended else tolerance
        for name, value in wanted.items():
            assert found[name].device.type == "cuda"
            torch.testing.assert_close(found[name].cpu(), value, rtol=near, atol=near)


@contextmanager
def pretend_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCard]:
    """Let PyTorch find one GPU, of 80 GB, of which 60 are free."""
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "get_device_name": NAME,
        "is_bf16_supported": True,
        "mem_get_info": (FREE, 80 * 10**9),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 10**6,
        "empty_cache": None,
        "synchronize": None,
        "reset_peak_memory_stats": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for kind in ("flash", "mem_efficient", "cudnn"):  # the CPU's kernels heed them, too
        monkeypatch.setattr(torch.backends.cuda, f"enable_{kind}_sdp", lambda enabled: None)
    autocast, make, count = torch.autocast, torch.nn.Parameter.__new__, LiveTensors.__init__
    is_enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype

    def stays(kind: Any, data: Any = None, requires_grad: bool = True) -> torch.Tensor:
        made = make(kind, data, requires_grad)
        return made if data is None else place(made, card=on_card(data))

    def counts(self: LiveTensors, device: torch.device) -> None:
        count(self, HOST)  # below this mode everything is where it really is

    monkeypatch.setattr(torch, "autocast", lambda _, *a, **k: autocast("cpu", *a, **k))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: is_enabled("cpu"))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: dtype_of("cpu"))
    monkeypatch.setattr(torch.nn.Parameter, "__new__", stays)
    monkeypatch.setattr(LiveTensors, "__init__", counts)
    with PretendCard() as card:
        yield card
