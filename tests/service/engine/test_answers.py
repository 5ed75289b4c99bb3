"""Any mix of documents, cut anyhow, gives the exact answers, and their rows are cut the same."""

import asyncio
import random

import pytest

from gma.service.engine.engine import Engine
from gma.service.engine.opening import Tokens
from gma.service.engine.progress import Progress
from gma.service.errors import StepFailed, UnknownDocument
from tests.matrix import some
from tests.service.engine.counting import (
    CHUNK,
    NO_TOKENS,
    OVERFLOWS,
    ROWS,
    CountingRunner,
    free_running,
    tokens_of,
)
from tests.service.engine.reading import (
    at_any_depth,
    check,
    cut,
    exchange,
    opening,
    read,
    rest,
    running,
)

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, ROWS * CHUNK, 63, 1000])
async def test_a_document_in_one_piece(length: int) -> None:
    async with running(CountingRunner()) as engine:
        check(await read(engine, tokens_of(length)), tokens_of(length))


@at_any_depth
@pytest.mark.parametrize("seed", some(range(20), always=range(8)))
async def test_however_it_is_cut_the_answer_and_its_rows_are_those_of_one_piece(
    seed: int, depth: int
) -> None:
    rng = random.Random(seed)
    tokens = tokens_of(rng.randrange(1, 200), seed)
    async with running(free_running(depth), inbox_tokens=rng.randrange(CHUNK, 40)) as engine:
        check(await read(engine, *cut(tokens, rng)), tokens)


@pytest.mark.parametrize("length", [CHUNK, 3 * CHUNK, 3 * CHUNK + 1])
async def test_the_end_may_come_without_tokens(length: int) -> None:
    tokens, progress = tokens_of(length), list[Progress]()
    async with running(CountingRunner()) as engine:
        document = engine.open(opening(tokens, last=False))
        async for each in document:
            progress.append(each)
            if each.tokens == length - length % CHUNK and not document.complete:
                await document.feed(NO_TOKENS, last=True)
    check(progress, tokens)
    assert (progress[-1].shares is None) == (length % CHUNK == 0), "nothing new was read"


@at_any_depth
@pytest.mark.parametrize("seed", some(range(8), always=range(3)))
async def test_documents_beside_each_other_do_not_see_each_other(seed: int, depth: int) -> None:
    rng = random.Random(seed)
    documents = [tokens_of(rng.randrange(1, 300), i) for i in range(30)]
    async with running(free_running(depth, slots=rng.randrange(1, 9))) as engine:
        answers = await asyncio.gather(*(read(engine, *cut(tokens, rng)) for tokens in documents))
    for progress, tokens in zip(answers, documents, strict=True):
        check(progress, tokens)


@at_any_depth
@pytest.mark.parametrize("seed", some(range(8), always=range(3)))
async def test_nobody_need_listen_before_the_end(seed: int, depth: int) -> None:
    rng = random.Random(seed)
    documents = [tokens_of(rng.randrange(1, 300), i) for i in range(20)]
    async with running(free_running(depth, slots=3)) as engine:
        opened = [engine.open(opening(tokens)) for tokens in documents]
        for document, tokens in zip(reversed(opened), reversed(documents), strict=True):
            check(await rest(document), tokens)


@at_any_depth
@pytest.mark.parametrize("seed", some(range(8), always=range(3)))
async def test_a_storm_of_ends_and_failures_leaves_the_others_right(seed: int, depth: int) -> None:
    """Documents whose client is cancelled, that are closed or overflow, among ones that stay."""
    rng = random.Random(seed)
    documents = [tokens_of(rng.randrange(1, 300), i) for i in range(60)]
    fates = [rng.choice(["stays", "cancel", "close", "overflow"]) for _ in documents]

    async def nap() -> None:
        for _ in range(rng.randrange(200)):
            await asyncio.sleep(0)

    async def live(engine: Engine, tokens: Tokens, fate: str) -> list[Progress]:
        if fate == "overflow":
            tokens[rng.randrange(len(tokens))] = OVERFLOWS
        first, *others = cut(tokens, rng)
        await nap()
        document = engine.open(opening(first, last=not others))
        reading = asyncio.create_task(exchange(document, others))
        await nap()
        if fate == "cancel":
            reading.cancel()
        elif fate == "close":
            document.close()
        return await reading

    async with running(free_running(depth, slots=5)) as engine:
        lives = (live(engine, tokens, fate) for tokens, fate in zip(documents, fates, strict=True))
        results = await asyncio.gather(*lives, return_exceptions=True)
    errors = {"cancel": asyncio.CancelledError, "close": UnknownDocument, "overflow": StepFailed}
    for tokens, fate, result in zip(documents, fates, results, strict=True):
        if isinstance(result, list):
            check(result, tokens)
            assert fate != "overflow"
        else:
            assert isinstance(result, errors[fate])
    for fate in errors:
        ends = [
            isinstance(result, list) for f, result in zip(fates, results, strict=True) if f == fate
        ]
        assert not all(ends), f"a storm without {fate}"
