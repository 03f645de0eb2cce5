"""Set the precision in which clients train.

``float32``: as the weights are (float64 where the data are). ``bf16-mixed``: matrix products of the
forward and the backward pass in bfloat16. Weights, what is trained, its gradients and moments, and
the losses stay in float32: an update is far smaller than the weight it is added to, and bfloat16,
with its 8 bits, would lose it. Evaluation and aggregation use the precision of the weights.
"""

from __future__ import annotations

import torch
from torch import nn

from fedraclora.errors import ConfigError

FLOAT32, BF16_MIXED = "float32", "bf16-mixed"
PRECISIONS = (FLOAT32, BF16_MIXED)


def products_in(precision: str, device: torch.device) -> torch.autocast:
    """Create the context of a forward pass, which sets the precision of matrix products.

    Args:
        precision: One of `PRECISIONS`.
        device: Where the pass runs.
    """
    # No cache of cast weights: it only helps a weight that is used twice in a pass, and holds
    # memory.
    mixed = precision == BF16_MIXED
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False)


def check_precision(precision: str, model: nn.Module, device: torch.device) -> None:
    """Reject a precision that the model or the device does not have.

    Raises:
        ConfigError: If it is mixed and a weight is not float32 or the GPU has no bfloat16, or it
            is not and a weight is narrow.
    """
    narrow = [n for n, p in model.named_parameters() if p.dtype == torch.bfloat16]
    if precision == FLOAT32:
        if narrow:
            raise ConfigError(
                f"model.base is bfloat16 (weight {narrow[0]}), but precision={precision}: "
                "products with such weights are in bfloat16; set precision=bf16-mixed"
            )
        return
    for name, parameter in model.named_parameters():
        if parameter.dtype not in {torch.float32, torch.bfloat16}:
            raise ConfigError(
                f"precision={precision}, but weight {name} is {parameter.dtype}: mixed "
                "precision is for float32 weights; set precision=float32, which leaves them as "
                "they are"
            )
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"precision={precision}, but {torch.cuda.get_device_name(device)} does not compute "
            "in bfloat16; set precision=float32"
        )
