"""How commands end where something is wrong: in one line and a status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from fedraclora.errors import FedRacLoraError

P = ParamSpec("P")


def reported(command: Callable[P, int]) -> Callable[P, int]:
    """Have a command print an error that is raised on purpose, and give status 1."""

    @wraps(command)
    def main(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except FedRacLoraError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return main
