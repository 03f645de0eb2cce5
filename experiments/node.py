"""``fedraclora node``: a SuperNode that answers sooner than Flower's, with the words of that.

See `fedraclora.engines.deploy.supernode`.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from fedraclora.engines.deploy.local import SUPERNODE


def main() -> NoReturn:
    """Become the SuperNode of the command line."""
    os.execv(sys.executable, [sys.executable, "-P", str(SUPERNODE), *sys.argv[1:]])  # noqa: S606
