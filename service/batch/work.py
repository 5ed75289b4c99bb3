"""The work on parts: what one machine does with all of them, and each actor with its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from gma.service.batch.manifest import Manifest
from gma.service.batch.output import Output, encoded, part_name
from gma.service.batch.reader import Reader
from gma.service.batch.records import records

AT_ONCE = 4
"""Parts that may be begun and not written: a long document must not keep others waiting, and
answers of all of them are in memory."""


class Done(NamedTuple):
    """What was read."""

    documents: int = 0
    errors: int = 0
    bytes: int = 0
    tokens: int = 0

    def and_(self, other: Done) -> Done:
        """Both together."""
        return Done(*(a + b for a, b in zip(self, other, strict=True)))

    @classmethod
    def of(cls, answers: list[dict[str, Any]]) -> Done:
        """What some answers tell of."""
        read = [answer for answer in answers if answer["error"] is None]
        return cls(
            len(answers),
            len(answers) - len(read),
            sum(answer["bytes"] for answer in read),
            sum(answer["tokens"] for answer in read),
        )


class Work:
    """A batch's manifest and output, and a reader."""

    def __init__(self, manifest: Manifest, output: Output, reader: Reader) -> None:
        self._manifest, self._output, self._reader = manifest, output, reader

    async def part(self, number: int, moved: Callable[[int], None] = lambda size: None) -> Done:
        """Read a part and write its answers.

        Raises OSError, and ValueError for what can't be read any further.
        """
        manifest, options = self._manifest, self._manifest.options
        found = records(manifest, manifest.parts[number])
        answers = await self._reader.read(found, options, moved)
        data = await asyncio.to_thread(encoded, answers, options)
        await asyncio.to_thread(self._output.put, part_name(number, options.format), data)
        return Done.of(answers)

    async def parts(self, numbers: Iterable[int], moved: Callable[[int], None]) -> Done:
        """Read parts, several at once; raises as `part` does. Those that are written stay."""
        done = Done()
        room = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            nonlocal done
            try:
                read = await self.part(number, moved)
                done = done.and_(read)
            finally:
                room.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                for number in numbers:
                    await room.acquire()
                    tasks.create_task(one(number))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return done
