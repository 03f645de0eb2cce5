"""Named tensors and their flat form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fedraclora.tree
from fedraclora.errors import ShapeError
from fedraclora.rng import generator, torch_normal
from fedraclora.tree import ALIGNED, Layout, Tree, digest, point_at, to_numpy, weights_of

shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)
trees = st.dictionaries(st.text(min_size=1, max_size=4), shapes, min_size=1, max_size=4)
TREE: Tree = {
    "w": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
    "b": torch.tensor([7.0]),
    "scalar": torch.tensor(8.0),
}


def drawn(shapes: dict[str, tuple[int, ...]], *lead: int) -> Tree:
    rng = generator(0, "tree")
    return {name: torch_normal(rng, *lead, *shape) for name, shape in shapes.items()}


def test_packing_writes_one_tensor_after_another() -> None:
    layout = Layout.of(TREE)
    assert layout.shapes == (("w", (2, 3)), ("b", (1,)), ("scalar", ()))
    assert layout.size == 8
    assert layout.pack(TREE).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_cohort_packs_into_rows() -> None:
    cohort = {"b": torch.tensor([[1.0], [2.0]]), "w": torch.tensor([[[3.0, 4.0]], [[5.0, 6.0]]])}
    layout = Layout.of(cohort, skip=1)
    assert layout.shapes == (("b", (1,)), ("w", (1, 2)))
    assert layout.pack(cohort, lead=1).tolist() == [[1, 3, 4], [2, 5, 6]]


@given(trees, st.integers(1, 9))
def test_pieces_are_the_columns_of_what_is_packed(
    shapes: dict[str, tuple[int, ...]], large: int
) -> None:
    tree = drawn(shapes, 3)
    layout = Layout.of(tree, skip=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedraclora.tree, "LARGE", large)
        pieces = layout.pieces(tree)
    assert torch.equal(torch.cat(pieces, dim=-1), layout.pack(tree, lead=1))
    kept = [t for t in tree.values() if t[0].numel() >= large]
    found = {piece.data_ptr() for piece in pieces}
    assert {t.data_ptr() for t in kept} <= found
    with pytest.raises(ShapeError, match="cannot pack"):
        layout.pieces(tree | {"more": torch.zeros(3)})


@given(trees, st.integers(0, 2))
def test_unpack_undoes_pack(shapes: dict[str, tuple[int, ...]], lead: int) -> None:
    tree = drawn(shapes, *(3, 2)[:lead])
    layout = Layout.of(tree, skip=lead)
    flat = layout.pack(tree, lead=lead)
    assert flat.shape == (*(3, 2)[:lead], layout.size)
    back = layout.unpack(flat)
    assert list(back) == list(tree)
    assert all(torch.equal(back[n], t) for n, t in tree.items())
    assert torch.equal(layout.pack(back, lead=lead), flat)


def test_unpack_undoes_pack_for_scalars() -> None:
    layout = Layout.of(TREE)
    back = layout.unpack(layout.pack(TREE))
    assert all(torch.equal(back[n], t) for n, t in TREE.items())


def test_packing_does_not_depend_on_memory_layout() -> None:
    w = torch.arange(6.0).reshape(2, 3)
    turned = w.T.contiguous().T
    assert not turned.is_contiguous()
    layout = Layout.of({"w": w})
    assert torch.equal(layout.pack({"w": turned}), layout.pack({"w": w}))


def test_packing_gives_a_new_tensor() -> None:
    tree = {"w": torch.zeros(3)}
    Layout.of(tree).pack(tree)[0] = 1.0
    assert tree["w"].tolist() == [0, 0, 0]


def test_an_empty_tree_has_no_numbers() -> None:
    layout = Layout.of({})
    assert layout.size == 0
    assert layout.pack({}).numel() == 0
    assert layout.unpack(torch.empty(0)) == {}


@pytest.mark.parametrize(
    "tree",
    [
        {"w": torch.zeros(2, 3), "b": torch.zeros(1)},  # a name is missing
        {"b": torch.zeros(1), "w": torch.zeros(2, 3), "scalar": torch.zeros(())},  # order
        {"w": torch.zeros(3, 2), "b": torch.zeros(1), "scalar": torch.zeros(())},  # transposed
        {"w": torch.zeros(6), "b": torch.zeros(1), "scalar": torch.zeros(())},
    ],
)
def test_a_tree_of_another_layout_is_not_packed(tree: Tree) -> None:
    with pytest.raises(ShapeError, match=r"cannot pack: .* of 3 tensors differ\)"):
        Layout.of(TREE).pack(tree)


def test_a_vector_of_another_length_is_not_unpacked() -> None:
    with pytest.raises(ShapeError, match=r"cannot unpack .*\(4, 7\).*must have 8"):
        Layout.of(TREE).unpack(torch.zeros(4, 7))


def test_to_numpy_takes_what_torch_has() -> None:
    turned = torch.arange(6.0, requires_grad=True).reshape(2, 3).mT
    array = to_numpy(turned)
    assert array.flags["C_CONTIGUOUS"]
    assert array.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_digest_sees_names_shapes_dtypes_and_every_bit() -> None:
    base = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
    others = [
        {"v": base["w"], "b": base["b"]},
        {"w": base["w"].reshape(3, 2), "b": base["b"]},
        {"w": base["w"].double(), "b": base["b"]},
        {"w": base["w"]},
        {"w": -base["w"], "b": base["b"]},  # minus zero
        {"w": base["w"] + torch.finfo(torch.float32).tiny, "b": base["b"]},
    ]
    digests = {digest(t) for t in [base, *others]}
    assert len(digests) == len(others) + 1


def test_the_digest_is_of_values_not_of_order_or_memory() -> None:
    w = torch.arange(6.0).reshape(2, 3)
    left = {"w": w, "b": torch.ones(2)}
    right = {"b": torch.ones(4)[::2], "w": w.T.contiguous().T}
    assert digest(left) == digest(right)
    assert len(digest({})) == 64


def test_weights_are_the_memory_of_the_model_where_it_is_aligned() -> None:
    model = nn.Linear(5, 3)
    odd = torch.zeros(16)[1:16].view(3, 5)
    model.weight = nn.Parameter(odd)
    held = weights_of(model)
    assert held["bias"].data_ptr() == model.bias.data_ptr()
    assert held["weight"].data_ptr() != model.weight.data_ptr()
    assert held["weight"].data_ptr() % ALIGNED == 0
    assert torch.equal(held["weight"], odd)


def test_a_model_that_is_pointed_at_weights_holds_them_and_no_others() -> None:
    model = nn.Linear(5, 3)
    new = {"weight": torch.ones(3, 5), "bias": torch.ones(3)}
    point_at(dict(model.named_parameters()), new)
    assert model.weight.data_ptr() == new["weight"].data_ptr()
    assert torch.equal(model(torch.ones(1, 5)), torch.full((1, 3), 6.0))
