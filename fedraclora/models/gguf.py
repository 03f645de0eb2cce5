"""GGUF files as pretrained models: transformers reads them, de-quantised to float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fedraclora.errors import DataError


def made_plain(model: nn.Module) -> nn.Module:
    """Take off a model what says that its weights are quantised: they are float32 now."""
    known: Any = model
    if hasattr(known.config, "quantization_config"):
        del known.config.quantization_config
        known.is_quantized, known.hf_quantizer = False, None
    return model


def precision_of(path: Path) -> str:
    """Name the types of numbers in a GGUF file, the most used first, for example ``Q4_1, F32``.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        from gguf import GGUFReader

        sizes: dict[str, int] = {}
        for tensor in GGUFReader(path).tensors:
            kind = tensor.tensor_type.name
            sizes[kind] = sizes.get(kind, 0) + int(tensor.n_elements)
    except (ImportError, OSError, ValueError) as error:
        raise DataError(f"model.path={path} cannot be read as GGUF: {error}") from error
    return ", ".join(sorted(sizes, key=lambda kind: -sizes[kind]))
