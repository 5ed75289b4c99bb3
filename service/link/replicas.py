"""Workers that are replicas of a Ray Serve deployment: Serve says where they are. Documents go to
them directly, for each of Serve's calls takes longer than a short document's step."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from gma.service.link.remote import Address

ANSWER_S = 1.0
"""How long a replica has to say where it is: one that hangs must not hide the others."""


class Replicas:
    """Looks for the replicas of a deployment that has a method `address`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def look(self) -> list[Address | None]:
        """What each replica answers; None for one that does not, in time or at all."""
        try:
            # What is public waits for all of them together.
            asked = await self._handle.broadcast("address")._fetch_replica_results_async()
        except DeploymentUnavailableError:
            return []
        return await asyncio.gather(*(_address(each) for each in asked))


async def _address(asked: Any) -> Address | None:
    try:
        async with asyncio.timeout(ANSWER_S):
            return Address(*await asked.get_async())
    except Exception:  # whatever Ray raises for a replica that is going, or gone
        return None
