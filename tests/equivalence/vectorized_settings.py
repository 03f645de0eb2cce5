"""Local settings and factors of every form, under which chunks are held against the oracle."""

from __future__ import annotations

from collections.abc import Callable

from vectorized_cases import SIZES, cnn, gpt2, mlp, normal, reader

from fedraclora.data.task import Task
from fedraclora.lowrank.layers import LayerView
from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, Factor
from fedraclora.sketch import SketchSpec

SETTINGS: dict[str, dict[str, object]] = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "decay": {"weight_decay": 0.05},
    "momentum-decay-clip": {"momentum": 0.9, "weight_decay": 0.05, "clip": 0.3},
    "clip": {"clip": 0.3},
    "clip-by-layer": {"clip": 0.2, "clip_by": "layer"},
    "prox": {"prox": 0.7},
    "prox-clip-momentum": {"prox": 0.7, "clip": 0.5, "momentum": 0.5},
    "dp": {"dp": SampleNoise(0.2, 0.5)},
    "dp-prox-momentum": {"dp": SampleNoise(0.1, 1.5), "prox": 0.7, "momentum": 0.5},
    "dp-adamw": {"dp": SampleNoise(0.5, 0.3), "optimizer": "adamw", "lr": 0.01},
    "dp-clip-only": {"dp": SampleNoise(0.05, 0.0)},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "adamw-decay-clip": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "clip": 0.5},
    "steps": {"steps": 7},
    "full-batch": {"batch_size": 0, "epochs": 3},
    "full-batch-steps": {"batch_size": 0, "steps": 4},
    "batch-of-one": {"batch_size": 1},
    "stored-order": {"shuffle": False},
    "one-rate": {"full_lr": None},
}

# The short suite has each setting, kind of layer and mask on B, on both factors and on whole
# weights, and those that meet most others on either factor in turn, a core between frozen factors,
# one of several heads and under a frozen factor of one's own.
WIDELY = {"fed_rac_lora", "fedavg_lora", "fedavg"}
ALSO = {"rolora", "fed_sb", "ravan", "flora_stacking", "fedkrso"}
MEETING = {
    "momentum-decay-clip",
    "prox-clip-momentum",
    "dp-prox-momentum",
    "adamw-decay-clip",
    "steps",
    "batch-of-one",
}

PROJECTED: dict[str, dict[str, object]] = {
    "precondition": {"precondition": True},
    "precondition-prox-clip": {"precondition": True, "prox": 0.7, "clip": 0.5},
    "precondition-dp": {"precondition": True, "dp": SampleNoise(0.05, 0.0)},
}


PAIRED: dict[str, dict[str, object]] = {
    "riemannian": {"adjust": "riemannian", "damping": 0.05},
    "scaled-adamw": {"adjust": "riemannian", "optimizer": "adamw", "lr": 0.01},
    "riemannian-prox-clip": {"adjust": "riemannian", "prox": 0.7, "clip": 0.5, "momentum": 0.5},
    "lora-pro": {"adjust": "lora_pro", "damping": 0.05},
    "lora-pro-adamw": {"adjust": "lora_pro", "optimizer": "adamw", "lr": 0.01},
    "lora-pro-dp": {"adjust": "lora_pro", "damping": 0.05, "dp": SampleNoise(0.1, 0.3)},
    "lora-rite": {"optimizer": "lora_rite", "lr": 0.01, "eps": 1e-4},
    "lora-rite-decay-prox": {
        "optimizer": "lora_rite",
        "lr": 0.02,
        "weight_decay": 0.1,
        "prox": 0.7,
        "beta1": 0.5,
        "eps": 1e-3,  # at 1e-4 rounding grows to 1e-10 in two rounds
    },
}


PAIRED |= {
    "gates": {"gate_penalty": 1.5},
    "gates-momentum-decay-clip": {
        "gate_penalty": 0.7,
        "momentum": 0.8,
        "weight_decay": 0.05,
        "clip": 0.3,
    },
    "gates-adamw-prox": {"gate_penalty": 5.0, "optimizer": "adamw", "lr": 0.02, "prox": 0.7},
    "gates-dp": {"gate_penalty": 1.5, "dp": SampleNoise(0.1, 0.3)},
}


PAIRED_METHODS = {
    "both": ("fedavg_lora", {}),
    "both-left": ("fedavg_lora", {"train": "A"}),
    "both-far-from-zero": ("frlora", {}),
    "B": ("fed_rac_lora", {"sketch": "gaussian"}),
    "A": ("fed_rac_lora", {"sketch": "gaussian", "train": "A", "merge_every": None}),
    "in-turn": ("rolora", {}),
    "own-frozen-factors": ("flora_stacking", {}),
}


def factor_of(form: str, *shape: int, key: str) -> Factor:
    """A factor of one of the forms of the contract, shared or one per client."""
    K = len(SIZES)
    if form == "zero":
        return to_train(shape)
    if form == "start":
        return to_train(shape, 0.4 * normal(*shape, key=key))
    if form == "starts":
        return to_train(shape, 0.4 * normal(K, *shape, key=key))
    if form == "frozen":
        return 0.4 * normal(*shape, key=key)
    if form == "own":
        return 0.4 * normal(K, *shape, key=key)
    rank, dim = sorted(shape)
    side = "right" if shape == (rank, dim) else "left"
    return SketchSpec("gaussian", side, rank, dim, 5, 0)


def trained_in(forms: tuple[str, ...]) -> int:
    """How many factors of an adapter are trained."""
    return sum(form in {"zero", "start", "starts"} for form in forms)


FORMS = [
    ("start", "sketched"),
    ("starts", "sketched"),
    ("starts", "own"),
    ("start", "own"),
    ("zero", "own"),
    ("own", "starts"),
    ("own", "start"),
    ("frozen", "starts"),
    ("sketched", "starts"),
    ("starts", "starts"),
    ("start", "starts"),
    ("own", "zero", "own"),
    ("own", "starts", "frozen"),
    ("frozen", "start", "sketched"),
    ("sketched", "starts", "own"),
    ("starts", "own", "starts"),
]

# Each form once, on either place, in two and in three factors: for kinds of layers that are trained
# by the same product as a linear one, and cost most. All forms on all kinds are slow.
A_FEW = {
    ("start", "sketched"),
    ("starts", "own"),
    ("frozen", "starts"),
    ("starts", "starts"),
    ("own", "zero", "own"),
    ("starts", "own", "starts"),
}
LIKE_LINEAR = {"conv1d", "square conv1d"}
LAYERS: dict[str, tuple[Callable[[], Task], tuple[str, ...]]] = {
    "linear": (mlp, ("fc1.weight", "fc2.weight")),
    "conv": (cnn, ("conv1.weight", "conv2.weight")),
    "conv1d": (gpt2, ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight")),
    "square conv1d": (gpt2, ("transformer.h.0.attn.c_proj.weight",)),
    "embedding": (reader, ("words.weight",)),
}


def adapters_of(
    forms: tuple[str, ...], names: tuple[str, ...], views: dict[str, LayerView]
) -> dict[str, Adapter]:
    labels = ("B", "A") if len(forms) == 2 else ("B", "M", "A")
    adapters = {}
    for name in names:
        m, n = views[name].shape
        edges = [m, 2, n] if len(forms) == 2 else [m, 2, 3, n]
        factors = {
            label: factor_of(form, edges[i], edges[i + 1], key=f"{name}/{label}")
            for i, (label, form) in enumerate(zip(labels, forms, strict=True))
        }
        adapters[name] = Adapter.of(factors, 0.7)
    return adapters
