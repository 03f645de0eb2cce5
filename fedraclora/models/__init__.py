"""Provide models by name."""

from __future__ import annotations

from collections.abc import Callable

from fedraclora.models.built import BuiltModel, check_fit
from fedraclora.models.custom import build_function, build_object
from fedraclora.models.hf import build_causal_lm, build_gpt, build_hf, build_transformer
from fedraclora.models.networks import build_cnn, build_linear, build_mlp

__all__ = ["MODELS", "BuiltModel", "check_fit"]

MODELS: dict[str, Callable[..., BuiltModel]] = {
    "linear": build_linear,
    "mlp": build_mlp,
    "cnn": build_cnn,
    "hf": build_hf,
    "transformer": build_transformer,
    "gpt": build_gpt,
    "causal_lm": build_causal_lm,
    "function": build_function,
    "object": build_object,
}
