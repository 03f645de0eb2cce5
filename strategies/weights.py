"""Read the trained weights of a run from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedraclora.binding import Plain
from fedraclora.config.run_config import from_plain
from fedraclora.data.locate import user_path
from fedraclora.errors import CheckpointError
from fedraclora.narrow_weight import dense
from fedraclora.protocol.method import Draw
from fedraclora.run.rebuild import weights_at
from fedraclora.run.trusted import read_trusted
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.wrappers import method_of
from fedraclora.tree import Tree
from fedraclora.trust import trust as trust_all


def load_weights(
    folder: Path | str,
    round_: int | None = None,
    *,
    own: Plain | None = None,
    trust: Sequence[str] = (),
) -> Tree:
    """Read the effective weights after a round, W_t: what the run measured, bit for bit.

    They fit a model with the parameters of the run (``load_state_dict``): adapters are merged, for
    every method.

    Args:
        folder: The run folder.
        round_: 0 to the last round, from the stored merges; None: the last checkpoint.
        own: A config of the user's own: code that it names the folder's may name, too.
        trust: Modules that the run may name, as for `fedraclora.read_run`.

    Returns:
        The weights by name, on the CPU. If clients keep a personal part of the model (a personal
        head, a factor of their own), these are the server's.

    Raises:
        CheckpointError: If a file is damaged, missing or of another run, or does not reach so far.
        ConfigError: If the run has code that is neither trusted nor the user's own; of it nothing
            was run (docs/security.md).
    """
    trust_all(trust)
    folder = user_path("folder", folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a run folder. Name the folder of a run")
    config = from_plain(read_trusted(folder, own), METHODS)
    return dense(weights_at(folder, round_, method_of(config), Draw(config.seed)))
