"""The private folder of one run of `gma serve`, and the end of what a run that died has left."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir, mkdtemp

from gma.service.app.start import StartError

PREFIX, UNFINISHED = "gma-", ".gma-"

LOCK = ".gma-serve"
"""File of such a folder, on which its process holds a lock for as long as it lives."""

MARK = "RAY_TMPDIR"
"""Variable that all processes of a run have from their start: its folder."""

FREE_BYTES = 16 * 1024**2
"""What there has to be room for: sockets, logs, metrics."""

SESSION = "ray"
"""What Ray has of such a folder: it opens its own to everybody."""

LONGEST = 37
"""Characters of the folder's path at most: Ray puts sockets 69 deeper into it, with SESSION, and
the kernel takes 107."""


@contextmanager
def run_folder() -> Iterator[Path]:
    """A new folder that nobody else can look into, removed at the end. Raises StartError."""
    parent = parent_folder()
    folder: Path | None = None
    try:
        # It gets its name with the lock: one that has the name and no lock is a dead one's.
        unfinished = Path(mkdtemp(prefix=UNFINISHED, dir=parent))
        lock = _lock(unfinished, os.O_CREAT)
        folder = unfinished
        folder = unfinished.rename(parent / unfinished.name.replace(UNFINISHED, PREFIX))
        _check_room(folder)
    except OSError as error:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        raise StartError(
            f"can't keep files in {parent}: {error.strerror}. TMPDIR chooses another folder"
        ) from error
    try:
        if len(str(folder)) > LONGEST:
            raise StartError(
                f"the path {parent} is too long for sockets below it: TMPDIR chooses a shorter one"
            )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def parent_folder() -> Path:
    """Where runs have their folders."""
    return Path(os.environ.get("TMPDIR") or gettempdir()).absolute()


def clear_dead(parent: Path) -> bool:
    """End the processes of runs whose `gma serve` is dead, and remove their folders.

    Returns whether there were any.

    A run is known by its folder: this user's, with a lock file that nobody has locked. A process is
    known to be of that run by this user, and by the folder's path in its environment.
    """
    cleared = False
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(FileNotFoundError):  # another start removes it just now
            if not _is_own(folder, stat.S_ISDIR) or not _is_own(folder / LOCK, stat.S_ISREG):
                continue
            lock = _lock(folder)
            if lock is None:
                continue
            try:
                end_processes(folder)
                shutil.rmtree(folder, ignore_errors=True)
                cleared = True
            finally:
                os.close(lock)
    return cleared


def end_processes(folder: Path, proc: Path = Path("/proc")) -> None:
    """Kill every process of the run with this folder, but this one, and wait until they are gone.

    `proc` is where the kernel tells of processes; without it, none are found.
    """
    for entry in proc.glob("[0-9]*"):
        pid = int(entry.name)
        if pid == os.getpid() or not _belongs(entry, folder):
            continue
        with suppress(ProcessLookupError):
            held = os.pidfd_open(pid)
            try:
                # Once more: now the id can't become another's.
                if _belongs(entry, folder):
                    signal.pidfd_send_signal(held, signal.SIGKILL)
                    select.select([held], [], [])
            finally:
                os.close(held)


def _belongs(entry: Path, folder: Path) -> bool:
    try:
        return f"{MARK}={folder}".encode() in (entry / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False


def _is_own(path: Path, of_kind: Callable[[int], bool]) -> bool:
    found = path.lstat()
    return of_kind(found.st_mode) and found.st_uid == os.geteuid()


def _lock(folder: Path, create: int = 0) -> int | None:
    """The open and locked file, or None if another process has locked it."""
    held = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | create, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    return held


def _check_room(folder: Path) -> None:
    """Raises OSError without room for what will be written."""
    probe = folder / "probe"
    with probe.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, FREE_BYTES)
    probe.unlink()
