"""``fedraclora node``: a SuperNode with lower latency than Flower's, and the same arguments.

Its internal API is a socket in a private folder, so arguments that set the address and security of
that API are rejected. With ``--plain``, or ``FEDRACLORA_UNPATCHED=all`` in the environment, Flower
runs unpatched, slower, and takes these arguments.
``--check`` starts nothing, and reports what would fail; ``--check=FILE`` also compares this machine
with the run for which the operator's ``fedraclora deploy --check=FILE`` wrote that file.

``--approve=FILE`` trains only runs whose digest is in FILE, within the limits there;
``--approve=ask`` shows each new run on this terminal, and asks. ``--history`` prints what came and
went: sums of each run, and the last 50 rounds; ``--history=N`` the last N, ``--history=2026-12-31``
those since a day (UTC), ``--history=all`` all. It is kept in ``--state=FOLDER``, without it
~/.local/state/fedraclora/node.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedraclora.commands.node_history import LAST_ROUNDS, print_history
from fedraclora.compose.words import check_word
from fedraclora.engines.certificates import superlink_warning
from fedraclora.engines.flower_patches import ALL, AT_SOCKETS, NODE, OWNED, UNPATCHED, why_without
from fedraclora.engines.owner.gate import ASK
from fedraclora.engines.owner.history import History
from fedraclora.engines.owner.policy import Policy
from fedraclora.engines.programs import RUNNER
from fedraclora.errors import ConfigError

PLAIN = "--plain"
# Flower also accepts abbreviated options.
OF_THE_API = ["--host", "--port", "--isolation", "--superexec-auth-secret-file"]
OF_THE_API += ["--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile"]


def main(words: Sequence[str]) -> int:
    """Replace this process by a SuperNode, check whether one could run here, or print its history.

    Raises:
        ConfigError: If an argument sets the address or security of the node's internal API, or the
            owner's files cannot be used.
    """
    plain = {UNPATCHED: ALL} if PLAIN in words else {}
    words = [word for word in words if word != PLAIN]
    for word in words if why_without(AT_SOCKETS, {**os.environ, **plain}) is None else ():
        name = word.partition("=")[0]
        if name.startswith("--") and any(option.startswith(name) for option in OF_THE_API):
            raise ConfigError(
                f"{name}: this node's API is a private socket. Leave this out, or run "
                "flower-supernode with the settings of docs/security.md."
            )
    words, file = check_word(words)
    if {"-h", "--help"} & {*words}:
        print(f"{__doc__}\nThe other arguments are those of flower-supernode:\n", flush=True)
        return start(words, {})
    own, words = owner_words(words)
    if own.history:
        return print_history(own.state or default_state(), own.history)
    if file is not None:
        from fedraclora.commands.check import check_node

        return check_node(words, file or None, own.approve)
    if told := certificate_warning(words):
        print(told, file=sys.stderr, flush=True)
    return start(words, {**watched(own), **plain})


def certificate_warning(words: Sequence[str]) -> str:
    """Say that the certificate of the SuperLink ends soon or has ended; empty if it does not."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--superlink", default="")
    parser.add_argument("--root-certificates", type=Path)
    with suppress(argparse.ArgumentError):  # Flower says what is wrong
        known, _ = parser.parse_known_args(words)
        if known.root_certificates is not None:
            return superlink_warning(known.superlink, known.root_certificates)
    return ""


def start(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Replace this process by a SuperNode."""
    command = [sys.executable, "-P", str(RUNNER), NODE, *words]
    return os.execve(sys.executable, command, {**os.environ, **environ})  # noqa: S606


def owner_words(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separate what the owner of the data asks for from the arguments of Flower's program."""
    parser = argparse.ArgumentParser(prog="fedraclora node", add_help=False, allow_abbrev=False)
    parser.add_argument("--approve")
    parser.add_argument("--history", nargs="?", const=LAST_ROUNDS)
    parser.add_argument("--state", type=Path)
    return parser.parse_known_args(words)


def default_state() -> Path:
    """Return the folder of the history, where none is given."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home, "fedraclora", "node")


def watched(own: argparse.Namespace) -> dict[str, str]:
    """Check the owner's files; return the environment of a node that uses them.

    Raises:
        ConfigError: If the policy cannot be read, or the folder cannot be written.
    """
    policy = own.approve
    if policy is not None and policy != ASK:
        policy = str(Path(policy).expanduser().resolve())
        Policy.read(Path(policy))
    if policy == ASK and not sys.stdin.isatty():
        raise ConfigError("--approve=ask asks on a terminal, and here is none: give --approve=FILE")
    state = (own.state or default_state()).expanduser().resolve()
    try:
        History(state)
    except ConfigError as error:
        if policy is not None or own.state is not None:
            raise
        print(f"this node keeps no history: {error}", file=sys.stderr)
        return {}
    return {OWNED: json.dumps({"policy": policy, "state": str(state)})}
