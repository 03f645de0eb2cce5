"""``fedraclora node``: a SuperNode with lower latency than Flower's, and the same arguments.

Its internal API is a socket in a private folder, so arguments that set the address and security of
that API are rejected. With ``FEDRACLORA_UNPATCHED=all`` in the environment, Flower runs unpatched.
``--check`` starts nothing, and reports what would fail; ``--check=FILE`` also compares this machine
with the run for which the operator's ``fedraclora deploy --check=FILE`` wrote that file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fedraclora.compose.words import check_word
from fedraclora.engines.flower_patches import AT_SOCKETS, NODE, why_without
from fedraclora.engines.programs import RUNNER
from fedraclora.errors import ConfigError

# Flower also accepts abbreviated options.
OF_THE_API = ["--host", "--port", "--isolation", "--superexec-auth-secret-file"]
OF_THE_API += ["--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile"]


def main(words: Sequence[str]) -> int:
    """Replace this process by a SuperNode, or check whether one could run here.

    Raises:
        ConfigError: If an argument sets the address or security of the node's internal API.
    """
    for word in words if why_without(AT_SOCKETS) is None else ():
        name = word.partition("=")[0]
        if name.startswith("--") and any(option.startswith(name) for option in OF_THE_API):
            raise ConfigError(
                f"{name}: this node's API is a private socket. Leave this out, or run "
                "flower-supernode with the settings of docs/security.md."
            )
    words, file = check_word(words)
    if {"-h", "--help"} & {*words}:
        print(f"{__doc__}\nThe other arguments are those of flower-supernode:\n", flush=True)
    if file is not None:
        from fedraclora.commands.check import check_node

        return check_node(words, file or None)
    command = [sys.executable, "-P", str(RUNNER), NODE, *words]
    return os.execv(sys.executable, command)  # noqa: S606
