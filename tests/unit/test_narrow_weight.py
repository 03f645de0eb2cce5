"""Weights in int8 and int4: what they are, what they keep, what they refuse."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedraclora.errors import ConfigError
from fedraclora.lowrank.layers import LayerView
from fedraclora.narrow_weight import BITS, GROUP, QuantisedWeight, in_parts, quantized, rejoined
from fedraclora.protocol.link import Link, Plan, Term, apply_link
from fedraclora.tree import digest, fingerprint
from fedraclora.weights.files import load_tensors, save_tensors
from fedraclora.weights.update import WeightHistory

M, N = 7, 96  # an odd number of rows: codes do not fill whole words
pytestmark = pytest.mark.parametrize("base", BITS)


def drawn(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(M, N, generator=torch.Generator().manual_seed(3), dtype=dtype)


def test_numbers_are_the_nearest_of_their_scale(base: str) -> None:
    W = drawn()
    W[2] = 0
    held = quantized(W, base, "w")
    found = held.dequantized()
    width = N if base == "int8" else GROUP
    scale = held.scale.repeat_interleave(width, dim=1)
    assert bool(((found - W).abs() <= 0.5001 * scale + 0.5 * scale * (found > 0)).all())
    assert not found[2].any()
    assert held.nbytes == M * N * BITS[base] // 8 + held.scale.numel() * 4


@pytest.mark.parametrize("shape", [(N,), (5, N), (2, 5, N)])
def test_gradients_are_those_of_the_dense_matrix_and_codes_alone_are_kept(
    shape: tuple[int, ...], base: str
) -> None:
    held = quantized(drawn(torch.float64), base, "w")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(M, dtype=torch.float64)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = F.linear(x, held, bias)
    assert [t.codes.data_ptr() for t in kept if isinstance(t, QuantisedWeight)] == [
        held.codes.data_ptr()
    ]
    assert not any(t.numel() == M * N for t in kept if not isinstance(t, QuantisedWeight))
    wanted = F.linear(x, held.dequantized(), bias)
    assert torch.equal(out, wanted)
    slopes = [torch.autograd.grad(y.square().sum(), x)[0] for y in (out, wanted)]
    assert torch.equal(*slopes)
    turned = torch.addmm(bias, x.reshape(-1, N), held.mT)  # as Conv1D of transformers has it
    assert torch.equal(turned, wanted.reshape(-1, M))


def test_products_in_bfloat16_copy_no_codes(base: str) -> None:
    held = quantized(drawn(), base, "w")
    x = torch.randn(4, N, requires_grad=True)
    kept: list[torch.Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        out = F.linear(x, held)
    assert out.dtype == torch.bfloat16
    found = [t for t in kept if t.numel() == M * N]
    assert [t.codes.data_ptr() for t in found] == [held.codes.data_ptr()]


def test_clients_as_one_batch_have_one_matrix(base: str) -> None:
    held, x = quantized(drawn(), base, "w"), torch.randn(3, 5, N)
    found = torch.func.vmap(lambda own: F.linear(own, held))(x)
    torch.testing.assert_close(found, F.linear(x, held.dequantized()))


def test_a_layer_is_copied_moved_and_never_written(base: str) -> None:
    layer = nn.Linear(N, M)
    layer.weight = nn.Parameter(quantized(drawn(), base, "w"), requires_grad=False)
    other = copy.deepcopy(layer)
    assert isinstance(other.weight, QuantisedWeight)
    assert isinstance(other.weight, nn.Parameter)
    assert other.weight.codes.data_ptr() != layer.weight.codes.data_ptr()
    wide = other.double().weight.detach()
    assert wide.dtype == torch.float64
    assert torch.equal(wide.dequantized(), layer.weight.dequantized().double())
    with torch.no_grad(), pytest.raises(RuntimeError, match="would write into QuantisedWeight"):
        layer.weight.add_(1.0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="is frozen"):
        layer.weight.copy_(drawn())


@pytest.mark.parametrize("turned", [False, True])
def test_files_and_messages_hold_codes(turned: bool, base: str, tmp_path: Path) -> None:
    held = quantized(drawn(), base, "w")
    tree = {"b": torch.ones(3), "w": held.mT if turned else held}
    save_tensors(tmp_path / "file.safetensors", tree, {}, sync=False)
    assert (tmp_path / "file.safetensors").stat().st_size < held.nbytes + 1500
    history = WeightHistory()
    history.publish(tree, 0)
    update = history.since(None)
    assert update.payload_bytes == 12 + held.nbytes
    for found in (
        rejoined(in_parts(tree)),
        load_tensors(tmp_path / "file.safetensors", "")[0],
        pickle.loads(pickle.dumps(update)).dense,
    ):
        assert list(found) == ["b", "w"]
        assert isinstance(found["w"], QuantisedWeight)
        assert torch.equal(found["w"], tree["w"])
        assert digest(found) == digest(tree)
        assert fingerprint(found) == fingerprint(tree)
    found["w"].codes[0, 0] ^= 1
    assert digest(found) != digest(tree)
    assert fingerprint(found) != fingerprint(tree)


def test_nothing_is_merged_into_it(base: str) -> None:
    tree = {"w": quantized(drawn(), base, "w")}
    link = Link({"w": Term.of((torch.ones(M, 2), torch.ones(2, N)), 0.5)})
    with pytest.raises(ConfigError, match=f"w is held in {base}.*merged"):
        apply_link(tree, link, Plan({"w": LayerView("linear", (M, N))}))


def test_a_row_that_does_not_divide_is_named(base: str) -> None:
    matrix = torch.randn(4, GROUP + 2)
    if base == "int8":
        assert quantized(matrix, base, "fc.weight").shape == (4, GROUP + 2)
        return
    with pytest.raises(ConfigError, match=r"groups of 32 numbers.*fc\.weight have 34.*int8"):
        quantized(matrix, base, "fc.weight")
