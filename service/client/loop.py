"""An event loop for those who have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Loop:
    """An event loop in a thread of its own, which begins with the first call."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what the coroutine does. Ctrl-C cancels it.

        Raises RuntimeError in the loop's own thread, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a callback of the client can't use the client")
        begun = self.begin(work)
        try:
            return begun.result()
        finally:
            begun.cancel()  # unless it has ended

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin to run the coroutine."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                run = self._loop.run_forever
                self._thread = threading.Thread(target=run, name="gma-client", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, last: Coroutine[Any, Any, None] | None = None) -> None:
        """Cancel what still runs, run `last`, and stop. Nothing is run if nothing ever was."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if not loop or not thread:
            if last:
                last.close()
            return
        ending = asyncio.run_coroutine_threadsafe(_end(last), loop)
        ending.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
        if threading.current_thread() is not thread:
            thread.join()
            loop.close()


async def _end(last: Coroutine[Any, Any, None] | None) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for each in others:
        each.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    if last:
        await last
