"""What is left of the project once a method is gone: imported, composed and run.

`tried` runs in a process of its own that has not imported the project yet, so nothing here does.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

SMALL = ("clients=4", "clients_per_round=2", "rounds=1", "pretrain=none", "data=digits")
# What takes long to import and is not ours: the server from which processes fork has it already.
LIBRARIES = ["torch", "torch.func", "flwr.app", "flwr.serverapp", "hydra", "pandas", "pydantic"]


def tried(folder: Path, methods: Sequence[str]) -> list[str]:
    """Import each module of a copy, and run each of some methods for a round.

    Returns:
        Names of the methods that the copy has.
    """
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    import fedraclora
    from fedraclora.strategies.methods import METHODS

    assert Path(fedraclora.__file__).is_relative_to(folder), fedraclora.__file__
    for module in pkgutil.walk_packages(fedraclora.__path__, "fedraclora."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # loggers need libraries that not all have
            if str(error.name).partition(".")[0] == "fedraclora":
                raise
    for method in methods:
        words = (*SMALL, "local.lr=0.1", "engine.chunk=2", "output.progress=false")
        assert fedraclora.simulate(f"method={method}", *words).summary["weights_digest"]
    return sorted(METHODS)
