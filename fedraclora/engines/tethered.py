"""Run a program of this environment that ends with its parent process.

``python -P tethered.py PROGRAM WORD ...``: the starter keeps the other end of the standard input
and never writes to it. When that end closes, because the starter ended or was killed, the program
gets SIGTERM. It runs as a file with the standard library only, since importing this project takes
seconds.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def watch() -> None:
    """Wait for the end of the standard input, then signal the program."""
    while os.read(0, 1 << 10):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    del sys.argv[0]
    threading.Thread(target=watch, daemon=True).start()
    runpy.run_path(sys.argv[0], run_name="__main__")
