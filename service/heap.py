"""Memory that this process has freed, and how it goes back to the system, where that is glibc's."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

M_MMAP_THRESHOLD, MMAP_BYTES = -3, 2**17


def set_up() -> None:
    """Have large pieces go back as soon as they are freed.

    By itself glibc would raise the size from which it does that to 32 MB once such a piece was.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


def settle() -> None:
    """Say that what is there now stays, so that `give_back` need not look through it."""
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Free what only refers to itself, and give back the small pieces between others."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
