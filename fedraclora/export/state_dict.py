"""The state dict of a trained model as one safetensors file: for any module of torch."""

from __future__ import annotations

from fedraclora.export.hf_folder import no_rank
from fedraclora.export.trained import Order, Record, TrainedModel
from fedraclora.weights.files import save_tensors


def write_state_dict(trained: TrainedModel, order: Order) -> Record:
    """Write ``model.safetensors``: parameters and buffers, tied ones under each of their names.

    Args:
        trained: What the run trained.
        order: Where to; without a rank: the weights are whole.

    Raises:
        ConfigError: If a rank is given.
    """
    no_rank(order.rank, "state_dict")
    tensors = trained.model.state_dict()
    digest = {"weights_digest": trained.facts.get("weights_digest")}
    save_tensors(order.folder / "model.safetensors", tensors, digest, sync=False)
    return {}
