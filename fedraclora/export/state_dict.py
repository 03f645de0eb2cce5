"""The state dict of a trained model as one safetensors file: for any module of torch."""

from __future__ import annotations

from pathlib import Path

from fedraclora.export.hf_folder import no_rank
from fedraclora.export.trained import Record, TrainedModel
from fedraclora.weights.files import save_tensors


def write_state_dict(trained: TrainedModel, folder: Path, rank: int | None) -> Record:
    """Write ``model.safetensors``: parameters and buffers, tied ones under each of their names.

    Args:
        trained: What the run trained.
        folder: Empty.
        rank: Must be None: the weights are whole.

    Raises:
        ConfigError: If a rank is given.
    """
    no_rank(rank, "state_dict")
    tensors = trained.model.state_dict()
    digest = {"weights_digest": trained.facts.get("weights_digest")}
    save_tensors(folder / "model.safetensors", tensors, digest, sync=False)
    return {}
