"""Models: shapes, heads, and weights that are a function of the seed."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from fedraclora.data.task import forward
from fedraclora.errors import ConfigError, DataError, FedRacLoraError
from fedraclora.lowrank.layers import find_targets, is_head
from fedraclora.models import MODELS, check_fit
from fedraclora.models.built import refuse_functions, seeded
from fedraclora.models.hf import set_dropout
from fedraclora.models.networks import Halve, build_cnn
from fedraclora.tree import digest

SMALL = {"hidden": 8, "layers": 2, "heads": 2, "intermediate": 12, "vocab": 20, "max_length": 9}
CASES = {
    "linear": ((6,), {"bias": False}),
    "mlp": ((6,), {"hidden": [5, 4], "dropout": 0.1}),
    "cnn": ((64,), {"channels": [3, 5], "hidden": 7, "dropout": 0.1}),
    "transformer": ((), SMALL),
    "gpt": ((), {"classes": 20, "hidden": 8, "layers": 2, "heads": 2, "max_length": 9}),
}
TEXT = ("transformer", "gpt")


def build(name: str, seed: int = 0, **change):
    shape, args = CASES[name]
    return MODELS[name](**{"shape": shape, "classes": 3, "seed": seed, **args, **change})


def batch(name: str) -> dict[str, torch.Tensor]:
    if name in TEXT:
        ids = torch.tensor([[2, 5, 7, 3], [2, 6, 3, 0]])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}
    return {"x": torch.rand(2, *CASES[name][0])}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_one_row_per_sample(name):
    built = build(name)
    assert built.model.training
    assert tuple(forward(built.model, batch(name)).shape) == (
        (2, 4, 20) if name == "gpt" else (2, 3)
    )
    assert all(p.dtype == torch.float32 for p in built.model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_weights_are_a_function_of_the_seed(name):
    one, two, other = (digest(build(name, seed).model.state_dict()) for seed in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize("name", CASES)
def test_building_leaves_the_global_generator_alone(name):
    before = torch.random.get_rng_state()
    build(name)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", CASES)
def test_targets_exist_and_leave_the_head_out(name):
    built = build(name)
    found = find_targets(built.model, built.targets, built.head)
    assert found
    assert not any(is_head(target, built.head) for target in found)
    for head in built.head:
        assert any(is_head(n, (head,)) for n, _ in built.model.named_parameters())


def test_layers_have_the_names_and_shapes_that_are_documented():
    shapes = {n: tuple(p.shape) for n, p in build("mlp").model.named_parameters()}
    assert shapes == {
        "fc1.weight": (5, 6),
        "fc1.bias": (5,),
        "fc2.weight": (4, 5),
        "fc2.bias": (4,),
        "fc3.weight": (3, 4),
        "fc3.bias": (3,),
    }
    assert build("mlp").head == ("fc3",)
    cnn = {n: tuple(p.shape) for n, p in build("cnn").model.named_parameters() if "weight" in n}
    assert cnn == {
        "conv1.weight": (3, 1, 3, 3),
        "conv2.weight": (5, 3, 3, 3),
        "fc1.weight": (7, 20),
        "fc2.weight": (3, 7),
    }
    assert [n for n, _ in build("linear").model.named_parameters()] == ["fc1.weight"]


def test_the_transfer_network_of_fedslop_has_its_parameters():
    model = build("mlp", shape=(784,), classes=10, hidden=[128]).model
    assert sum(p.numel() for p in model.parameters()) == 101_770


def test_images_with_channels_are_taken_as_they_are():
    built = build("cnn", shape=(2, 9, 12))
    assert tuple(built.model(torch.rand(4, 2, 9, 12)).shape) == (4, 3)
    flat = build("mlp", shape=(2, 3, 4))
    assert tuple(flat.model(torch.rand(4, 2, 3, 4)).shape) == (4, 3)
    assert tuple(build("linear", shape=(2, 3)).model(torch.rand(4, 2, 3)).shape) == (4, 3)


@pytest.mark.parametrize("way", [lambda pool: pool, torch.func.vmap], ids=["plain", "vmapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pooling_has_the_bits_of_torch_in_values_and_gradients(way, dtype):
    assert isinstance(build("cnn").model.pool1, Halve)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(3, 5, 9, 12, generator=draw).relu().to(dtype)  # most ties are zeros
    images[0, 0], images[1, 1], images[2, 2, 3, 4] = 1.5, -torch.inf, torch.nan
    found = list[tuple[torch.Tensor, ...]]()
    for pool in map(way, (Halve(2), nn.MaxPool2d(2))):
        with torch.no_grad():
            seen = pool(images)
        x = images.clone().requires_grad_()
        trained = pool(x)
        g = torch.randn(trained.shape, generator=draw.manual_seed(1)).to(dtype)
        found.append((seen, trained.detach(), *torch.autograd.grad(trained, x, g)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.is_contiguous() == theirs.is_contiguous()
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))


def test_samples_do_not_interact():
    for name in CASES:
        model, inputs = build(name).model.eval(), batch(name)
        alone = forward(model, {key: value[:1] for key, value in inputs.items()})
        assert torch.allclose(forward(model, inputs)[:1], alone, atol=1e-6)


@pytest.mark.parametrize("name", TEXT)
def test_both_kinds_of_attention_agree(name):
    fused, plain = (build(name, attention=kind).model for kind in ("sdpa", "eager"))
    inputs = batch(name)
    assert torch.allclose(forward(fused, inputs), forward(plain, inputs), atol=1e-6)


def test_dropout_is_in_modules_only():
    model = build("transformer", dropout=0.25).model
    assert model.config.attention_probs_dropout_prob == 0.0
    rates = {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert rates.pop("dropout") == 0.25
    assert {rate for n, rate in rates.items() if "attention.self" in n} == {0.0}
    assert {rate for n, rate in rates.items() if "attention.self" not in n} == {0.25}


def test_a_gpt_reads_the_past_alone_and_has_a_head_of_its_own():
    built = build("gpt", dropout=0.25)
    rates = {n: m.p for n, m in built.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {rate for n, rate in rates.items() if n.endswith("attn_dropout")} == {0.0}
    assert {rate for n, rate in rates.items() if not n.endswith("attn_dropout")} == {0.25}
    model = built.model.eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    other = torch.tensor([[5, 6, 7, 9]])
    one, two = (forward(model, {"input_ids": x}) for x in (ids, other))
    assert torch.equal(one[:, :3], two[:, :3])
    assert not torch.equal(one[:, 3], two[:, 3])
    assert model.lm_head.weight is not model.transformer.wte.weight


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    build("transformer", seed=5).model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def reported() -> Iterator[list[str]]:
    """Collect what transformers logs: its handler writes to the stderr of its first import."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    transformers.utils.logging.add_handler(handler)
    yield found
    transformers.utils.logging.remove_handler(handler)


def load(path: str, **change):
    return MODELS["hf"](**{"shape": (), "classes": 3, "seed": 0, "path": path, **change})


def test_a_stored_model_is_loaded_as_it_is(stored, reported, capfd):
    built = load(stored)
    assert digest(built.model.state_dict()) == digest(
        build("transformer", seed=5).model.state_dict()
    )
    assert (built.head, built.targets) == (("classifier",), "query,value")
    assert built.model.training
    assert reported == []
    assert capfd.readouterr() == ("", "")


def test_a_head_of_another_size_is_drawn_from_the_seed(stored, reported, capfd):
    one, two, other = (load(stored, classes=2, seed=seed).model for seed in (1, 1, 2))
    assert digest(one.state_dict()) == digest(two.state_dict())
    assert tuple(one.classifier.weight.shape) == (2, 8)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert torch.equal(one.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert reported == []
    assert capfd.readouterr() == ("", "")


def test_only_the_first_layers_may_be_kept(stored):
    short = load(stored, layers=1).model
    whole = load(stored).model
    assert len(short.bert.encoder.layer) == 1
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(short.state_dict()[name], whole.state_dict()[name])


def test_half_precision_weights_become_float32_masters(stored, tmp_path):
    load(stored).model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load(str(tmp_path)).model.parameters()} == {torch.float32}


def test_dropout_of_a_stored_model_is_set(stored):
    assert load(stored, dropout=0.3).model.config.hidden_dropout_prob == 0.3
    assert load(stored).model.config.hidden_dropout_prob == 0.0


@pytest.mark.parametrize("kind", ["AlbertConfig", "T5Config", "XLNetConfig", "XLMConfig"])
def test_dropout_has_another_name_in_some_architectures(kind):
    import transformers

    config = getattr(transformers, kind)()
    named = {n for n in vars(config) if "dropout" in n and getattr(config, n)}
    assert named
    set_dropout(config, 0.0)
    assert not {n for n in named if getattr(config, n)}


def test_the_draws_of_two_purposes_differ():
    draws = []
    for seed, purpose in ((1, "model"), (1, "other"), (2, "model"), (1, "model")):
        with seeded(seed, purpose):
            draws.append(float(torch.rand(())))
    assert draws[0] == draws[3]
    assert len(set(draws)) == 3


def test_tokens_and_lengths_beyond_the_model_are_refused():
    model = build("transformer").model
    check_fit(model, {"input_ids": torch.full((2, 9), 19)})
    check_fit(build("mlp").model, {"x": torch.zeros(2, 6)})
    with pytest.raises(ConfigError, match=r"token id 20.*knows 20 tokens.*model.vocab"):
        check_fit(model, {"input_ids": torch.full((2, 9), 20)})
    with pytest.raises(ConfigError, match=r"data.max_length=10.*9 tokens"):
        check_fit(model, {"input_ids": torch.zeros(2, 10, dtype=torch.int64)})


BAD = {
    "linear on text": ("linear", {"shape": ()}, "model=linear.*model=transformer"),
    "mlp on text": ("mlp", {"shape": ()}, "model=mlp.*token ids"),
    "text on dense": ("transformer", {"shape": (6,)}, r"model=transformer.*\(6,\).*model=mlp"),
    "classes": ("mlp", {"classes": 0}, "number of outputs"),
    "hidden": ("mlp", {"hidden": [5, 0]}, r"model.hidden\[1\]=0"),
    "no hidden": ("mlp", {"hidden": []}, "model=linear"),
    "dropout": ("mlp", {"dropout": 1.0}, "model.dropout=1.0"),
    "no image": ("cnn", {"shape": (60,)}, "square number of pixels"),
    "small image": ("cnn", {"shape": (9,)}, "model.channels.*nothing is left of 3 x 3 pixels"),
    "no channels": ("cnn", {"channels": []}, "model.channels"),
    "channels": ("cnn", {"channels": [0]}, r"model.channels\[0\]=0"),
    "cnn hidden": ("cnn", {"hidden": 0}, "model.hidden"),
    "gpt on dense": ("gpt", {"shape": (6,)}, r"model=gpt.*\(6,\)"),
    "gpt heads": ("gpt", {"heads": 3}, "model.hidden=8.*model.heads=3"),
    "gpt length": ("gpt", {"max_length": 0}, "model.max_length"),
    "gpt attention": ("gpt", {"attention": "flash"}, "model.attention 'flash'.*eager, sdpa"),
    "heads": ("transformer", {"heads": 3}, "model.hidden=8.*model.heads=3"),
    "vocab": ("transformer", {"vocab": 0}, "model.vocab"),
    "attention": ("transformer", {"attention": "flash"}, "model.attention 'flash'.*eager, sdpa"),
}


@pytest.mark.parametrize(("name", "change", "words"), BAD.values(), ids=BAD)
def test_bad_input_names_the_key(name, change, words):
    with pytest.raises(ConfigError, match=words):
        build(name, **change)


def test_a_stored_model_that_is_wrong_is_named(stored, tmp_path):
    with pytest.raises(FedRacLoraError, match=r"model.path is not set"):
        load("")
    with pytest.raises(DataError, match=r"model.path=bert-base.*hub:NAME"):
        load("bert-base")
    with pytest.raises(DataError, match=r"cannot load|cannot be loaded"):
        load(str(tmp_path))
    with pytest.raises(DataError, match=r"no .*model.safetensors.*model.sha256"):
        load(str(tmp_path), sha256="00")
    with pytest.raises(DataError, match=r"sha256"):
        load(stored, sha256="00")
    with pytest.raises(ConfigError, match=r"model\.layers=3: .*2 layers"):
        load(stored, layers=3)
    with pytest.raises(ConfigError, match=r"model=hf reads token ids"):
        load(stored, shape=(4,))


def test_a_decoder_with_several_ends_pads_with_the_first(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 9}
    config = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=[4, 5], pad_token_id=None)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    built = load(str(tmp_path))
    assert built.model.config.pad_token_id == 4
    assert tuple(forward(built.model, batch("transformer")).shape) == (2, 3)


# --- what would do nothing -----------------------------------------------------------------------


class Net(nn.Module):
    """A layer, what drops values, and a head."""

    def __init__(self, drop: Callable[[torch.Tensor, bool], torch.Tensor] | nn.Module) -> None:
        super().__init__()
        self.body, self.head, self.drop = nn.Linear(4, 6), nn.Linear(6, 3), drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x)
        if not isinstance(self.drop, nn.Module):
            return self.head(self.drop(hidden, self.training))
        return self.head(self.drop(hidden))


def attention(x: torch.Tensor, training: bool) -> torch.Tensor:
    one = x[:, None]
    return functional.scaled_dot_product_attention(one, one, one, dropout_p=0.2 * training)[:, 0]


@pytest.mark.parametrize(
    ("drop", "name"),
    [
        (lambda x, training: functional.dropout(x, 0.3, training), "dropout (rate 0.3)"),
        (lambda x, training: functional.dropout(x, training=training), "dropout (rate 0.5)"),
        (lambda x, training: functional.alpha_dropout(x, p=0.1, training=training), "alpha_drop"),
        (attention, "scaled_dot_product_attention (rate 0.2)"),
    ],
    ids=["rate", "default", "alpha", "attention"],
)
def test_dropout_by_a_function_is_refused(drop, name):
    with pytest.raises(ConfigError, match=re.escape(f"drops values by {name}")):
        refuse_functions(Net(drop).train(), {"x": torch.rand(2, 4)})


@pytest.mark.parametrize(
    "drop",
    [
        nn.Dropout(0.3),
        lambda x, training: functional.dropout(x, 0.0, training),
        lambda x, training: functional.dropout(x, 0.3, training=False),
    ],
    ids=["module", "rate 0", "off"],
)
def test_dropout_that_acts_or_is_off_passes(drop):
    model = Net(drop).train()
    before = torch.random.get_rng_state()
    refuse_functions(model, {"x": torch.rand(2, 4, generator=torch.Generator())})
    refuse_functions(model, {"x": torch.rand(0, 4)})  # nobody here has samples
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not isinstance(drop, nn.Dropout) or drop.p == 0.3


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_rate_that_no_module_takes_is_refused(kind, tmp_path):
    # OPT drops by a function, Llama not at all.
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"ffn_dim": 12, "word_embed_proj_dim": 8} if kind == "opt" else {"intermediate_size": 12}
    config = transformers.AutoConfig.for_model(
        kind, **sizes, **more, pad_token_id=0, bos_token_id=1
    )
    config.eos_token_id = 2
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    arguments = {"shape": (), "classes": 3, "seed": 0, "path": str(tmp_path)}
    assert MODELS["hf"](**arguments).head == ("score",)
    with pytest.raises(ConfigError, match=r"model.dropout=0.3, but \w+ has no torch.nn.Dropout"):
        MODELS["hf"](**arguments, dropout=0.3)


def net(shape, classes):
    return Net(nn.Identity())


@pytest.mark.parametrize("head", ["classifier", "drop", "hea", ""])
def test_a_head_that_names_no_layer_with_weights_is_refused(head, monkeypatch):
    monkeypatch.setattr("fedraclora.models.custom.object_of", lambda *_, **__: net)
    arguments = {"function": "mine:net", "shape": (4,), "classes": 3, "seed": 0}
    with pytest.raises(ConfigError, match=r"layer as model.head .* There are: body, head"):
        MODELS["function"](**arguments, head=["head", head])
    assert MODELS["function"](**arguments, head=["head"]).head == ("head",)


def test_a_cnn_may_have_wider_kernels_and_no_hidden_layer() -> None:
    """As in DeComFL's code, which counts 28,938 numbers."""
    model = build_cnn(shape=(1, 28, 28), classes=10, seed=0, hidden=None, kernel=5).model
    assert sum(p.numel() for p in model.parameters()) == 28_938
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ConfigError, match="kernel"):
        build_cnn(shape=(1, 28, 28), classes=10, seed=0, kernel=4)
