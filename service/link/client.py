"""How a gateway sees workers: open a document on one, feed it there, and hear how far it got.

`gma.service.link.replicas` has workers in other processes, `gma.service.worker.Worker` is one in
this process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gma.service.engine.document import Progress
from gma.service.gateway.contract import WorkerInfo

Tokens = NDArray[np.int32]


class Reading(Protocol):
    """A document that a worker holds."""

    def __aiter__(self) -> AsyncIterator[Progress]:
        """Progress as steps read the document, the last with `done`. Raises ServiceError."""

    async def feed(self, offset: int, tokens: Tokens, last: bool) -> None:
        """Add tokens; `offset` is how many came before. Waits while too many of them are unread.

        At most 2**18 a call, which is 1 MiB. Raises ServiceError.
        """


class WorkerClient(Protocol):
    """The workers, as a gateway sees them."""

    def open(
        self, document: str, tokens: Tokens, last: bool, *, evidence: bool, running: bool
    ) -> AbstractAsyncContextManager[Reading]:
        """A new document, with its first tokens. It lives on its worker as long as the context.

        With `running`, its iteration tells the answer so far as steps read it; without, little more
        than the last one: every message costs its worker time.

        Raises ServiceError: NotReady without a worker, Overloaded if none has room.
        """

    async def info(self) -> WorkerInfo:
        """What the workers run. Raises NotReady if none does."""
