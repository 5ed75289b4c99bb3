"""The folder through which a machine's processes share metrics, and what is kept of ended ones.

prometheus_client has a process write what it counts into files of its own, named by its id, and
never removes them. Here a process that lives holds a lock on `ID.alive`, so that an id that is
another's by now deceives nobody. What an ended process counted is added to two files, which are
replaced as a whole, so that there are as many files as processes that live, and a few.

Adding may be cut short at any point without counting anything twice or not at all. Files are set
apart by a name that says in which generation of the sum they are to be, and removed once it is
there; whatever of an earlier generation is found later is removed, for it is counted.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that names the folder."""

KINDS = ("counter", "histogram")
"""Whose numbers stay when a process ends. Gauges tell of the present."""

# What prometheus_client raises for a file that was cut short, or damaged.
DAMAGED = (struct.error, RuntimeError, UnicodeDecodeError)


def prepare(folder: Path) -> None:
    """Make the folder if need be, and remove all metrics of it: nobody must share any through it.

    Raises OSError if it can't be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        for file in _files(folder):
            file.unlink()


def join(folder: Path) -> None:
    """Share this process's metrics through a folder, which is made if need be.

    Call it before prometheus_client is imported. Raises OSError if the folder can't be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[DIRECTORY] = str(folder)
    with alone(folder):
        add_ended(folder)
        # Never closed: the lock ends with the process.
        held = os.open(_alive(folder, os.getpid()), os.O_RDWR | os.O_CREAT, 0o644)
        with suppress(BlockingIOError):  # this process has joined before
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else looks at the folder, or changes what there is of ended processes."""
    held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def add_ended(folder: Path) -> None:
    """Forget the gauges of processes that have ended, and add what they counted to the sum.

    Only within `alone`.
    """
    files = [file for file in _files(folder) if file.suffix in (".db", ".alive")]
    owners = {file: file.stem.rpartition("_")[2] for file in files}
    ended = {pid for pid in owners.values() if pid.isdecimal() and not _lives(folder, int(pid))}
    generation = {kind: _recovered(folder, kind) for kind in KINDS}
    for file, pid in owners.items():
        kind = file.name.partition("_")[0]
        # What another user's process left in a folder that protects it stays there.
        with suppress(PermissionError):
            if pid in ended and kind in KINDS:
                file.rename(file.with_suffix(f".ended-{generation[kind] + 1}"))
            elif pid in ended:
                file.unlink()
    for kind in KINDS:
        _add(folder, kind, generation[kind])


def _recovered(folder: Path, kind: str) -> int:
    """The sum's generation, 0 before the first; what is in it by now is gone afterwards."""
    sums = {int(file.stem.rpartition("-")[2]): file for file in folder.glob(f"{kind}_ended-*.db")}
    last = max(sums, default=0)
    counted = [file for number, file in sums.items() if number < last]
    ended = folder.glob(f"{kind}_*.ended-*")
    counted += [file for file in ended if int(file.suffix.rpartition("-")[2]) <= last]
    for file in counted:
        file.unlink()
    return last


def _add(folder: Path, kind: str, generation: int) -> None:
    """Make the next generation of the sum from the last and from the files set apart for it."""
    from prometheus_client.mmap_dict import MmapedDict

    ended = list(folder.glob(f"{kind}_*.ended-{generation + 1}"))
    if not ended:
        return
    before = folder / f"{kind}_ended-{generation}.db"
    total: dict[str, float] = defaultdict(float)
    for file in (before, *ended):
        with suppress(FileNotFoundError, *DAMAGED):  # there is none before the first
            for key, value, *_ in MmapedDict.read_all_values_from_file(file):  # type: ignore[no-untyped-call]
                total[key] += value
    made = folder / f"{kind}_ended.new"
    made.unlink(missing_ok=True)
    sums = MmapedDict(made)  # type: ignore[no-untyped-call]
    for key, value in total.items():
        sums.write_value(key, value, 0.0)  # type: ignore[no-untyped-call]
    sums.close()  # type: ignore[no-untyped-call]
    made.rename(folder / f"{kind}_ended-{generation + 1}.db")
    for file in (before, *ended):
        file.unlink(missing_ok=True)


def _lives(folder: Path, pid: int) -> bool:
    """Whether a process that joined under this id holds its lock."""
    try:
        held = os.open(_alive(folder, pid), os.O_RDONLY)
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's, which can't be told
        return True
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(held)
    return False


def _alive(folder: Path, pid: int) -> Path:
    return folder / f"{pid}.alive"


def _files(folder: Path) -> Iterator[Path]:
    """What this module and prometheus_client write there, and nothing else."""
    for pattern in ("gauge_*.db", *(f"{kind}_*" for kind in KINDS), "*.alive"):
        yield from folder.glob(pattern)
