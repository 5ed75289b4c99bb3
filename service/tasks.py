"""Two tasks of which one is pointless without the other."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def guarded(work: Coroutine[Any, Any, T], *, by: Coroutine[Any, Any, None]) -> T:
    """Return the result of `work`. If `by` fails first, cancel `work` and raise that error.

    Both have ended, and so have freed what they held, when this returns or raises.
    """
    working, guard = asyncio.ensure_future(work), asyncio.ensure_future(by)
    try:
        await asyncio.wait({working, guard}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            guard.result()
        return await working
    finally:
        working.cancel()
        guard.cancel()
        await asyncio.gather(working, guard, return_exceptions=True)
        # An error that is raised here has this frame in its traceback, and either may hold it: what
        # its frames hold would stay until the garbage collector comes.
        del working, guard
