"""The usage of components: rows' counts are added up, for the documents that asked for it."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from gma.service.engine.document import Document
from gma.service.engine.step import Batch, Outcome
from gma.service.errors import Validation
from tests.service.engine.counting import (
    COMPONENTS,
    CountingRunner,
    free_running,
    tokens_of,
    used,
)
from tests.service.engine.reading import at_any_depth, cut, exchange, opening, rest, running

pytestmark = pytest.mark.anyio


@at_any_depth
async def test_every_document_that_asks_gets_its_own(depth: int) -> None:
    rng = random.Random(depth)
    documents = [tokens_of(length, seed) for seed, length in enumerate([1, 4, 5, 33, 100, 16])]
    async with running(free_running(depth, slots=3)) as engine:

        async def read(index: int) -> None:
            first, *others = cut(documents[index], rng)
            asked = opening(first, last=not others, components=index % 2 == 0)
            progress = await exchange(engine.open(asked), others)
            assert all(each.usage is None for each in progress[:-1])
            found = progress[-1].usage
            assert (found is not None) == (index % 2 == 0)
            if found is not None:
                assert found.dtype == np.float64
                assert found.tolist() == [[used(documents[index])]]

        async with asyncio.TaskGroup() as group:
            for index in range(len(documents)):
                group.create_task(read(index))


async def test_only_steps_of_who_asks_count() -> None:
    runner = CountingRunner()
    async with running(runner) as engine:
        for components in (False, True, False):
            await rest(engine.open(opening(tokens_of(9), components=components)))
    assert [batch.count for batch in runner.steps] == [False, True, False]


async def test_ten_million_tokens_add_up() -> None:
    """Sums in float32 would be off by more than a thousandth."""

    class Thirds(CountingRunner):
        def count(self, batch: Batch) -> Outcome:
            outcome = super().count(batch)
            assert outcome.usage is not None
            outcome.usage[:] = (batch.lengths / COMPONENTS)[:, None, None, None]
            return outcome

    runner = Thirds(rows=8, chunk=2048)
    piece = np.zeros(2**16, np.int32)
    pieces = 10**7 // len(piece)
    async with running(runner, inbox_tokens=2**17) as engine:
        document: Document = engine.open(opening(piece, last=False, components=True))
        progress = await exchange(document, [piece] * pieces)
    usage = progress[-1].usage
    assert usage is not None
    expected = (pieces + 1) * len(piece) / COMPONENTS
    np.testing.assert_allclose(usage, np.full((1, 1, COMPONENTS), expected), rtol=1e-7)


async def test_a_model_that_cannot_count_refuses() -> None:
    runner = CountingRunner()
    runner.counts = False
    async with running(runner) as engine:
        with pytest.raises(Validation, match=r"^components: .* leave the option out"):
            engine.open(opening(tokens_of(3), components=True))
        assert (await rest(engine.open(opening(tokens_of(3)))))[-1].usage is None
