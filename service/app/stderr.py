"""The stderr of `gma serve`, for processes that Ray starts and gives files instead.

Whoever connects to a socket is given the file itself, and logs to it directly from then on: each
line is in one place, as it was written, and nothing is between. What else a process or its
libraries print goes to Ray's files.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

STDERR = "stderr"
"""The socket, in the folder of a run."""

NUMBER = 2


@contextmanager
def shared_stderr(path: Path) -> Iterator[None]:
    """Give this process's stderr to whoever connects to the socket `path`, which is made."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        giver = threading.Thread(target=_give, args=(listening,), name="stderr", daemon=True)
        giver.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            giver.join()


def given_stderr(path: Path) -> TextIO:
    """The stderr that is given at the socket `path`. Raises OSError if none is."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(path))
        _, (given, *_), *_ = socket.recv_fds(asking, 1, 1)
    return os.fdopen(given, "w", encoding="utf-8", errors="backslashreplace")


def _give(listening: socket.socket) -> None:
    # Without a stderr, its number may be any file's.
    with open(NUMBER if sys.__stderr__ else os.devnull, "wb", closefd=not sys.__stderr__) as given:
        while True:
            try:
                asking, _ = listening.accept()
            except OSError:  # it was shut down
                return
            with asking:
                socket.send_fds(asking, [b" "], [given.fileno()])
