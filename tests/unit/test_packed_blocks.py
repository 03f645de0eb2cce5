"""Blocks of transformers that see real tokens alone: the same outputs and gradients as padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedraclora.data.task import forward
from fedraclora.models.built import seeded
from fedraclora.models.packed import Packer
from fedraclora.models.packed_layout import PackedLayout, bucket_tops
from fedraclora.rng import generator

LENGTHS = torch.tensor([2, 5, 1, 3, 4, 1])  # of two clients' samples
TOKENS = 6
LAYOUT: dict[str, Any] = {"clients": 2, "tokens": TOKENS, "longest": 8, "tops": (5, 2)}
MASK = torch.arange(TOKENS) < LENGTHS[:, None]
SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
}
SMALL |= {"num_attention_heads": 3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def model_of(kind: str, attention: str = "sdpa", **more: Any) -> torch.nn.Module:
    import transformers

    with seeded(3, "model"):
        if kind == "bert":
            config: Any = transformers.BertConfig(**SMALL, attn_implementation=attention, **more)
            model: torch.nn.Module = transformers.BertForSequenceClassification(config)
            return model.double().eval()
        shape = {"num_key_value_heads": 1, "attn_implementation": attention, "head_dim": 4}
        name = "Mistral" if "sliding_window" in more else "Llama"
        config = getattr(transformers, f"{name}Config")(**SMALL, **shape, **more)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        return model.double().eval()


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(generator(0, "ids").integers(1, 30, (len(LENGTHS), TOKENS)))
    return {"input_ids": ids * MASK, "attention_mask": MASK.long()}


def test_rows_of_clients_and_of_buckets_are_there_and_back() -> None:
    lengths = LENGTHS * torch.tensor([1, 1, 1, 1, 1, 0])  # the last one does not count
    mask = torch.arange(TOKENS) < lengths[:, None]
    layout = PackedLayout.of(lengths, **LAYOUT)
    tokens = torch.arange(len(LENGTHS) * TOKENS).reshape(len(LENGTHS), TOKENS) + 1
    packed = layout.pack(tokens[..., None])[..., 0]
    wanted = [tokens[:3][mask[:3]].tolist(), tokens[3:][mask[3:]].tolist()]
    assert [row[: len(w)].tolist() for row, w in zip(packed, wanted, strict=True)] == wanted
    assert torch.equal(layout.spread(packed[..., None])[..., 0][mask], tokens[mask])
    there, back = layout.of_heads(2)
    heads = torch.stack([packed.flatten(), -packed.flatten()], dim=1).flatten()  # [L, heads]
    first = heads[there][: 3 * 2 * 5].view(3, 2, 5)  # of samples 1, 4 and 3, longest first
    for row, sample in enumerate((1, 4, 3)):
        real = tokens[sample, : LENGTHS[sample]]
        assert torch.equal(first[row, 0, : len(real)], real)
        assert torch.equal(first[row, 1, : len(real)], -real)
    known = back < len(there) - 1
    assert torch.equal(heads[there][back][known], heads[known])
    assert int(known.sum()) == 2 * int(lengths.sum())


def test_buckets_are_of_some_samples_each() -> None:
    assert bucket_tops([9, 8, 1]) == (9,)
    assert bucket_tops([*range(20, 0, -1)]) == (20, 10)
    assert bucket_tops([7] * 40 + [0] * 8) == (7, 7, 7, 7)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_packed_outputs_and_gradients_are_those_of_padded_ones(kind: str, attention: str) -> None:
    model = model_of(kind, attention)
    packer = Packer.of(model)
    assert packer is not None
    found = []
    names, leaves = zip(*model.named_parameters(), strict=True)
    for layout in (None, PackedLayout.of(LENGTHS, **LAYOUT)):
        packer.use(layout)
        output = forward(model, inputs())
        seen = output if kind == "bert" else output[MASK]
        slope = torch.from_numpy(generator(1, "slope").standard_normal(tuple(seen.shape)))
        gradients = torch.autograd.grad((seen * slope).sum(), leaves)
        found.append([seen.detach(), *gradients])
    packer.use(None)
    # Llama's eager attention has its softmax in float32.
    close = 1e-6 if (kind, attention) == ("llama", "eager") else 1e-12
    assert torch.allclose(found[0][0], found[1][0], rtol=0, atol=close)
    for name, padded, packed in zip(names, found[0][1:], found[1][1:], strict=True):
        assert torch.allclose(padded, packed, rtol=0, atol=10 * close), name
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))  # it was packed


@pytest.mark.parametrize("reason", ["window", "position", "plain"])
def test_other_models_stay_as_they_are(reason: str) -> None:
    if reason == "window":
        model = model_of("mistral", sliding_window=3)
    elif reason == "plain":
        model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    else:  # a block that looks at its place in the padded batch
        model = model_of("bert")
        block: Any = model.get_submodule("bert.encoder.layer.1")
        plain = block.forward

        def shifted(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return plain(hidden.cumsum(dim=1), *args, **kwargs)

        block.forward = shifted
    assert Packer.of(model) is None
    if reason != "plain":
        assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
        assert forward(model, inputs()).isfinite().all()
