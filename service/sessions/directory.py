"""Sessions in a directory, of this machine or one that several machines share.

A session is a file, its snapshot; its time of modification is when it expires. It is written beside
its place and renamed, so a process that dies leaves the one before or the one after.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gma.service.errors import StoreFailed, StoreFull
from gma.service.sessions.store import Stored

ENDING = ".safetensors"

UNFINISHED = ".new-"
"""What names of files begin with that are being written."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Directory:
    """A `Store`. Locks are the kernel's, so those of a process that died are free."""

    def __init__(self, folder: Path, kept_s: float) -> None:
        """`kept_s`: how long what has expired stays. Raises ValueError if the folder can't be
        used."""
        self._folder = folder
        self._locks = folder / "locks"
        self._kept_s = kept_s
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._locks.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"sessions can't be kept in {folder}: {error.strerror}. GMA_SESSIONS chooses "
                "another place"
            ) from error

    def secret(self) -> bytes:
        file = self._folder / "secret"
        with _told():
            if not file.exists():  # else nothing has to be written, which may not be allowed
                with self._locked("secret"):
                    if not file.exists():
                        self._put(file, Stored(secrets.token_bytes(32), 0.0))
            return file.read_bytes()

    def create(self, name: str, stored: Stored) -> None:
        with _told():
            self._put(self._file(name), stored)

    def read(self, name: str) -> Stored | None:
        with _told():
            try:
                with self._file(name).open("rb") as file:
                    return Stored(file.read(), os.fstat(file.fileno()).st_mtime)
            except FileNotFoundError:
                return None

    def replace(self, name: str, version: str, stored: Stored) -> bool:
        with _told(), self._locked(name):
            found = self.read(name)
            if found is None or found.version != version:
                return False
            self._put(self._file(name), stored)
            return True

    def delete(self, name: str) -> None:
        with _told(), self._locked(name):
            self._file(name).unlink(missing_ok=True)

    def sweep(self, now: float) -> None:
        with _told():
            for entry in os.scandir(self._folder):
                if entry.name.endswith(ENDING) or entry.name.startswith(UNFINISHED):
                    with suppress(FileNotFoundError):
                        self._forget(Path(entry.path), now)

    def _forget(self, file: Path, now: float) -> None:
        if file.stat().st_mtime + self._kept_s >= now:
            return
        with self._locked(file.name.removesuffix(ENDING)):
            if file.stat().st_mtime + self._kept_s < now:  # nobody appends to it meanwhile
                file.unlink()

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}{ENDING}"

    def _put(self, file: Path, stored: Stored) -> None:
        """Write a file whole, or not at all, and to the disk."""
        unfinished = self._folder / f"{UNFINISHED}{secrets.token_hex(8)}"
        try:
            created = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(created, "wb") as written:
                written.write(stored.data)
                written.flush()
                os.utime(created, (stored.expires_at, stored.expires_at))
                os.fsync(created)
            unfinished.replace(file)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise
        held = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(held)
        finally:
            os.close(held)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """While this lasts nobody else is in it with this name: a few that share a lock wait for
        each other."""
        held = os.open(self._locks / name[:2], os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield
        finally:
            os.close(held)


@contextmanager
def _told() -> Iterator[None]:
    """The system's errors as the service's own."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StoreFull from error
        raise StoreFailed(
            f"the store of sessions can't be used, and the session is as it was: {error.strerror}"
        ) from error
