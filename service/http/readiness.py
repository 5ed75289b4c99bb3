"""Whether documents are answered."""

from __future__ import annotations

import asyncio
import math
import time

from gma.service.errors import NotReady, ShuttingDown
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model

TIMEOUT_S = 1.0
MEMORY_S = 30.0
"""How long after a model's worker has answered one that does not in time is taken to be busy."""


class Readiness:
    """Raises Unavailable unless the documents of a gateway are answered."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._answered_at: dict[str, float] = {}

    async def __call__(self, model: Model | None = None) -> None:
        """Of one model, or of all that there are, which are one at least."""
        if self._gateway.admission.draining:
            raise ShuttingDown("the service is shutting down")
        models = [model] if model else [*self._gateway.models]
        if not models:
            raise NotReady("no worker is ready yet")
        await asyncio.gather(*map(self._check, models))

    async def _check(self, model: Model) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await model.workers.info()
            self._answered_at[model.name] = time.monotonic()
        except TimeoutError:
            # Whoever keeps this process busy must not take it out of rotation.
            since = time.monotonic() - self._answered_at.get(model.name, -math.inf)
            if since > MEMORY_S:
                raise NotReady(f"no worker of {model.name} is ready yet") from None
