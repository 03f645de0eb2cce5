"""Flower's programs with their APIs at Unix sockets, where other users of the machine cannot come.

``python -P sockets.py PROGRAM WORD ...``. By itself Flower 1.42 listens at ports of 127.0.0.1,
which every user of the machine can reach, and asks for no credential there: neither of who starts
runs nor of who takes the task of a node. It can ask for a secret of those who take tasks
(``--superexec-auth-secret-file``), but only where its SuperExec is started by hand, and the token
of every task stands in the list of processes.

Here the environment says, as JSON in `VARIABLE`, which addresses are sockets: who would listen at
one listens at its socket, who would call it calls there, and a token goes through a file. Run as a
file, without this project: what an app imports is its own copy of it.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VARIABLE = "FEDRACLORA_SOCKETS"
TOKEN = "--token"  # noqa: S105  a word of the programs for tasks; its value is the secret


def use_sockets(program: str) -> None:
    """Let one of Flower's programs listen and call at sockets, in this process, if there are any.

    Args:
        program: For example ``flower-superlink``.
    """
    if not sockets():
        return
    client = import_module("flwr.supercore.protobuf.client")
    put(client, httpx=SimpleNamespace(**{**vars(client.httpx), "Client": calling}))
    if program == "flower-superlink":
        module = import_module("flwr.superlink.cli.flower_superlink")
        put(module, uvicorn=SimpleNamespace(run=listening(module.uvicorn.run)))
        late = subprocess.TimeoutExpired
        put(module, subprocess=SimpleNamespace(Popen=popen, TimeoutExpired=late))
    elif program == "flower-supernode":
        module = import_module("flwr.supernode.cli.flower_supernode")
        server, config = module.uvicorn.Server, listening(module.uvicorn.Config)
        put(module, uvicorn=SimpleNamespace(Server=server, Config=config))
        module = import_module("flwr.supernode.start_client_internal")
        put(module, subprocess=SimpleNamespace(Popen=popen))  # its SuperExec calls a socket, too
    elif program == "flower-superexec":
        module = import_module("flwr.supercore.superexec.executor.subprocess_executor")
        put(module, subprocess=SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))


def sockets() -> dict[str, str]:
    """Read which addresses are sockets, and where these are.

    Raises:
        SystemExit: If that cannot be read: then nothing may listen or call anywhere.
    """
    text = os.environ.get(VARIABLE, "{}")
    try:
        return {str(address): str(path) for address, path in json.loads(text).items()}
    except (ValueError, AttributeError):
        sys.exit(f'{VARIABLE}={text}: JSON like {{"127.0.0.1:8000": "/run/link/api"}} is wanted')


def listening(make: Callable[..., Any]) -> Callable[..., Any]:
    """Let what makes a web server have it listen at the socket of its address, if that has one."""

    def made(*words: Any, host: str, port: int, **named: Any) -> Any:
        return make(*words, host=host, port=port, uds=sockets().get(f"{host}:{port}"), **named)

    return made


def calling(*, verify: Any = True, **named: Any) -> Any:
    """Make a client of the web that calls addresses which have a socket there."""
    import httpx

    known = httpx.create_ssl_context(verify) if isinstance(verify, str) else verify
    mounts = {
        f"all://{address}": httpx.HTTPTransport(uds=path, verify=known)
        for address, path in sockets().items()
    }
    return httpx.Client(verify=known, mounts=mounts, **named)


def popen(words: Sequence[str], **named: Any) -> subprocess.Popen[bytes]:
    """Start another of Flower's programs, with its token in a file that only this user can read."""
    words = list(words)
    if TOKEN in words:
        at = words.index(TOKEN)
        with tempfile.NamedTemporaryFile("w", prefix="token-", delete=False) as file:
            file.write(words[at + 1])
        words[at : at + 2] = [f"{TOKEN}-file", file.name]
    return subprocess.Popen([sys.executable, "-P", __file__, *words], **named)  # noqa: S603


def put(module: object, **names: object) -> None:
    """Replace names of a module of Flower, which must be there.

    Raises:
        AttributeError: If this Flower has none of that name.
    """
    for name, value in names.items():
        getattr(module, name)
        setattr(module, name, value)


def main() -> None:
    """Run the program that the command line names."""
    del sys.argv[0]
    use_sockets(Path(sys.argv[0]).name)
    sys.argv[0] = shutil.which(sys.argv[0]) or sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
