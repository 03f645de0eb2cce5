"""What another user of this machine can do, tried as that user; only root can become one."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

NOBODY = 65534

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become another user, to try what that one can do"
)


def as_stranger(act: Callable[[], object]) -> str:
    """Do something in a process of another user; give what came of it, as text."""
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            said = repr(act())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(theirs, said.encode()[:4000])
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as said_there:
        said = said_there.read()
    os.waitpid(child, 0)
    return said
